"""Writes a checkpoint in safetensors shards, one tensor after the other, so that no more than a tensor is in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mball.loader.checkpoint import INDEX_FILE, SINGLE_FILE
from mball.loader.header import BITS


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written; `dtype` is safetensors' name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, as they stand in a file."""
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write(
    folder: Path,
    tensors: Sequence[TensorSpec],
    data: Callable[[TensorSpec], Iterable[memoryview]],
    *,
    max_shard_bytes: int,
    wrote: Callable[[int], None],
) -> None:
    """Writes `tensors` in their order, with an index where there is more than one shard.

    `data` gives a tensor's bytes in pieces, `wrote` is told the size of each. A tensor larger than
    `max_shard_bytes` is a shard of its own. Raises ValueError where `data` gives another number of bytes than the
    tensor has.
    """
    shards = _split(tensors, max_shard_bytes)
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, data, wrote)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _header(tensors: Sequence[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks that the data begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text


def _write_shard(
    path: Path,
    tensors: Sequence[TensorSpec],
    data: Callable[[TensorSpec], Iterable[memoryview]],
    wrote: Callable[[int], None],
) -> None:
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            left = tensor.nbytes
            for piece in data(tensor):
                count = file.write(piece)
                left -= count
                wrote(count)
            if left:
                raise ValueError(f"{path}: {tensor.name} is {tensor.nbytes} bytes, {left} of them were not given")
