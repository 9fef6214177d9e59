import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mball.errors import UnsupportedCheckpoint
from mball.loader import Slice, load, source, stream
from mball.loader.checkpoint import Checkpoint
from mball.loader.selection import RUN_BYTES, select

RANKS = 4


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {
        "layers.0.q_proj.weight": torch.randn(256, 96).bfloat16(),
        "layers.0.o_proj.weight": torch.randn(96, 256).bfloat16(),
        "layers.0.wide.weight": torch.randn(3, 4 * RUN_BYTES // 4),
        "layers.0.experts": torch.randn(4, 6, 8, 5),
        "layers.0.norm.weight": torch.randn(96),
        "empty": torch.empty(8, 0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def slices(rank: int) -> dict[str, Slice]:
    return {
        "*.q_proj.weight": Slice(0, rank, RANKS),
        "*.o_proj.weight": Slice(1, rank, RANKS),
        "*.wide.weight": Slice(-1, rank, RANKS),
        "*.experts": Slice(2, rank, RANKS),
        "empty": Slice(0, rank, RANKS),
    }


IN_RUNS = ("o_proj.weight", "experts")
"""Of which a rank's part lies in short pieces."""
DIMS = {"q_proj": 0, "o_proj": 1, "wide": 1, "experts": 2, "empty": 0}


def part(name: str, tensor: Tensor, rank: int) -> Tensor:
    dim = next((dim for key, dim in DIMS.items() if key in name), None)
    return tensor if dim is None else tensor.chunk(RANKS, dim)[rank]


@pytest.mark.parametrize("gap_bytes", [0, source.GAP_BYTES])
def test_each_rank_has_its_part_and_reads_no_more(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, gap_bytes: int
) -> None:
    """But for what lies between the parts of a row and the next, where that is little."""
    read: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], at: int) -> int:
        read.append(preadv(fd, buffers, at))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(source, "GAP_BYTES", gap_bytes)
    for rank in range(RANKS):
        read.clear()
        loaded = load(tmp_path, slices=slices(rank), threads=3)
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], part(name, tensor, rank)), name
        whole = [name for name in tensors if gap_bytes and name.endswith(IN_RUNS)]
        gaps = sum(tensors[name].nbytes - loaded[name].nbytes for name in whole)
        assert sum(read) <= 1.02 * (gaps + sum(tensor.nbytes for tensor in loaded.values()))


def test_a_slice_that_does_not_fit_is_an_error(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for wrong in (Slice(0, 0, 7), Slice(2, 0, 2), Slice(-3, 0, 2)):
        with pytest.raises(UnsupportedCheckpoint, match="q_proj"):
            load(tmp_path, slices={"*q_proj*": wrong})
    with pytest.raises(ValueError, match="rank 4 of 4"):
        load(tmp_path, slices={"*q_proj*": Slice(0, 4, 4)})


def test_names_with_wildcards(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint.open(tmp_path)

    def names(include: set[str], exclude: set[str]) -> set[str]:
        return {wanted.info.name for wanted in select(checkpoint, include, exclude)}

    assert names(set(), set()) == tensors.keys()
    assert names({"*_proj.weight"}, set()) == {"layers.0.q_proj.weight", "layers.0.o_proj.weight"}
    assert names({"*_proj.weight"}, {"*.o_*"}) == {"layers.0.q_proj.weight"}
    assert names({"none"}, set()) == set()
    assert load(tmp_path, include={"empty"}).keys() == {"empty"}
    assert load(tmp_path, include={"none"}) == {}


@pytest.mark.parametrize("group_bytes", [1, 60_000, 10**9])
def test_a_stream_gives_the_same_in_the_order_of_the_file(
    tmp_path: Path, tensors: dict[str, Tensor], group_bytes: int
) -> None:
    got = dict(stream(tmp_path, group_bytes=group_bytes, slices=slices(1)))
    assert list(got) == list(Checkpoint.open(tmp_path).tensors)
    for name, tensor in tensors.items():
        assert torch.equal(got[name], part(name, tensor, 1))


def test_a_stream_that_is_left_ends(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    streaming = stream(tmp_path, group_bytes=1)
    name, tensor = next(streaming)
    streaming.close()
    assert torch.equal(tensor, tensors[name])
