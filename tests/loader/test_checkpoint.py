import json
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mball.errors import BadIndex, DuplicateName, FileTruncated, MissingShard, UnsupportedCheckpoint
from mball.loader.checkpoint import INDEX_FILE, Checkpoint
from tests.loader.files import write_sharded

A = torch.arange(3000, dtype=torch.float32)
B = torch.arange(5, dtype=torch.int64)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path, {ONE: {"a": A}, TWO: {"b": B, "c": A}})


def test_a_single_file_by_its_own_path_and_by_its_folder(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    by_folder, by_file = Checkpoint.open(tmp_path), Checkpoint.open(str(tmp_path / "model.safetensors"))
    assert by_folder.tensors == by_file.tensors
    assert by_folder.nbytes == A.nbytes + B.nbytes
    assert by_folder.path == tmp_path
    assert by_folder.tensors["b"].dtype == "I64"
    assert by_folder.tensors["b"].nbytes == B.nbytes


def test_shards_in_order_with_page_aligned_places_in_the_image(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    assert [shard.path.name for shard in checkpoint.shards] == [ONE, TWO]
    assert {name: info.shard for name, info in checkpoint.tensors.items()} == {"a": 0, "b": 1, "c": 1}
    assert [shard.image_offset for shard in checkpoint.shards] == [0, 3 * mmap.PAGESIZE]
    assert checkpoint.image_bytes == 6 * mmap.PAGESIZE
    for info in checkpoint.tensors.values():
        content = checkpoint.shards[info.shard].path.read_bytes()[info.start : info.end]
        assert content == {"a": A, "b": B, "c": A}[info.name].numpy().tobytes()


def test_the_index_decides_where_two_shards_hold_a_name(sharded: Path) -> None:
    save_file({"b": B, "c": A, "a": A + 1}, sharded / TWO)
    assert Checkpoint.open(sharded).tensors["a"].shard == 0


def test_a_single_file_wins_over_an_index(sharded: Path) -> None:
    save_file({"x": A}, sharded / "model.safetensors")
    assert list(Checkpoint.open(sharded).tensors) == ["x"]


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / TWO).unlink()
    with pytest.raises(MissingShard, match=f"{TWO}.*download"):
        Checkpoint.open(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    content = (sharded / TWO).read_bytes()
    (sharded / TWO).write_bytes(content[:-1])
    with pytest.raises(FileTruncated, match=TWO):
        Checkpoint.open(sharded)


def test_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    save_file({"b": B}, sharded / TWO)
    with pytest.raises(BadIndex, match=r"'c'.*lacks it"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("place", ["../x", "/etc/passwd", "..", ".", "", "sub/model.safetensors", "./x", "x/", 1, None])
def test_an_index_that_leaves_its_folder(tmp_path: Path, place: object) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(BadIndex, match="not a file of this folder"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map":[]}', '{"weight_map":{}}', "\xff", "[" * 100_000])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadIndex):
        Checkpoint.open(tmp_path)


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text('{"weight_map":{"a":"x","a":"y"}}')
    with pytest.raises(DuplicateName):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_alone_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(UnsupportedCheckpoint, match=f"{name}.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_a_folder_with_nothing_and_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="neither"):
        Checkpoint.open(tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match="no such"):
        Checkpoint.open(tmp_path / "none")
