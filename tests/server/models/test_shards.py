from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mball.loader.checkpoint import Checkpoint
from mball.server.models import shards
from mball.server.models.shards import TensorSpec


def write(folder: Path, sizes: list[int], max_shard_bytes: int) -> dict[str, torch.Tensor]:
    """Tensors t0, t1, … of so many elements, each filled with its number; returns what was written."""
    tensors = {f"t{number}": torch.full((size,), number, dtype=torch.float32) for number, size in enumerate(sizes)}
    specs = [TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    shards.write(
        folder,
        specs,
        lambda spec: [shards.tensor_bytes(tensors[spec.name])],
        max_shard_bytes=max_shard_bytes,
        wrote=lambda _: None,
    )
    return tensors


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(4, 200))
def test_what_is_written_is_read_by_the_library_and_by_our_loader(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], max_shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    tensors = write(folder, sizes, max_shard_bytes)
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert list(Checkpoint.open(folder).tensors) == list(tensors)


def test_no_shard_is_over_the_limit_unless_one_tensor_is(tmp_path: Path) -> None:
    write(tmp_path, [10, 10, 30, 10], max_shard_bytes=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 240
    assert index["weight_map"] == {
        "t0": "model-00001-of-00003.safetensors",
        "t1": "model-00001-of-00003.safetensors",
        "t2": "model-00002-of-00003.safetensors",
        "t3": "model-00003-of-00003.safetensors",
    }


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write(tmp_path, [10], max_shard_bytes=80)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_with_too_few_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t is 16 bytes, 8 of them were not given"):
        shards.write(
            tmp_path,
            [TensorSpec("t", "F32", (4,))],
            lambda _: [memoryview(bytes(8))],
            max_shard_bytes=100,
            wrote=lambda _: None,
        )
