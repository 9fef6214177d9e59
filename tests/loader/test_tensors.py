from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mball.errors import CheckpointError, FileTruncated, UnsupportedCheckpoint
from mball.loader import load
from mball.loader.dtypes import TORCH, torch_shape
from mball.loader.header import BITS
from mball.units import MiB
from tests.loader.files import entry, file_bytes, mapping_of, write_sharded


def test_every_dtype_bit_for_bit(tmp_path: Path) -> None:
    tensors, data, wanted = {}, b"", {}
    for name in TORCH:
        nbytes = BITS[name] * 12 // 8
        raw = bytes(torch.randint(0, 256, (nbytes,), dtype=torch.uint8).tolist())
        raw = bytes(byte & 1 for byte in raw) if name == "BOOL" else raw
        tensors[name] = entry(name, [3, 4], len(data), len(data) + nbytes)
        data += raw
        wanted[name] = raw
    (tmp_path / "m.safetensors").write_bytes(file_bytes(tensors, data))
    loaded = load(tmp_path / "m.safetensors")
    assert loaded.keys() == TORCH.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == TORCH[name]
        assert tensor.shape == torch_shape(name, (3, 4))
        assert bytes(tensor.flatten().view(torch.uint8).tolist()) == wanted[name]


def test_shards_scalars_and_empty_tensors(tmp_path: Path) -> None:
    shards = {
        "1.safetensors": {
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 7),
            "odd": torch.arange(5).to(torch.int8),
        },
        "2.safetensors": {"wide": torch.randn(2_200, 1_000, dtype=torch.float64)},
    }
    loaded = load(write_sharded(tmp_path, shards), threads=3)
    wanted = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_unaligned_data_are_loaded(tmp_path: Path) -> None:
    content = file_bytes({"b": entry("U8", [1], 0, 1), "w": entry("F32", [2], 1, 9)}, b"\x07" + bytes(8))
    (tmp_path / "m.safetensors").write_bytes(content)
    assert load(tmp_path / "m.safetensors")["w"].data_ptr() % 64 == 0


def test_the_result_owns_anonymous_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    wanted = {"a": torch.randn(1024, 1024), "b": torch.randn(2048, 1024)}
    save_file(wanted, path)
    loaded = load(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert not torch.equal(torch.tensor(list(path.read_bytes()[:8])), torch.zeros(8, dtype=torch.int64))
    for name, tensor in wanted.items():
        assert torch.equal(loaded[name], tensor)
        mapped, fields = mapping_of(loaded[name].data_ptr())
        assert mapped == ""
        assert fields["Anonymous"] >= 12 * MiB
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_the_smaps_check_sees_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(1024, 1024)}, path)
    loaded = load_file(path)
    assert mapping_of(loaded["a"].data_ptr())[0] == str(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileTruncated, match=r"model\.safetensors"):
        load(tmp_path)


def test_a_dtype_that_torch_lacks(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(file_bytes({"six": entry("F6_E2M3", [4], 0, 3)}, bytes(3)))
    with pytest.raises(UnsupportedCheckpoint, match=r"'six'.*F6_E2M3"):
        load(tmp_path / "m.safetensors")


def test_a_shape_that_torch_lacks(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(file_bytes({"vast": entry("U8", [0, 2**63], 0, 0)}))
    with pytest.raises(CheckpointError, match="'vast'"):
        load(tmp_path / "m.safetensors")
