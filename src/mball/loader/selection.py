"""Which of a checkpoint's tensors are wanted, and which part of each: pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mball.errors import UnsupportedCheckpoint
from mball.loader.checkpoint import Checkpoint, TensorInfo
from mball.loader.dtypes import TORCH, torch_shape
from mball.loader.plan import Extent, Runs
from mball.units import KiB

RUN_BYTES = 256 * KiB
"""Runs of so many bytes are read as extents of their own."""

_MAX_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Slice:
    """What rank `rank` of `world_size` keeps of a tensor: an equal share along dimension `dim`, in order."""

    dim: int
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor as it is to be: `shape` is torch's, of the slice where there is one."""

    info: TensorInfo
    shape: tuple[int, ...]
    slice: Slice | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH[self.info.dtype].itemsize

    def extents(self, offset: int) -> Iterator[Extent]:
        """Its bytes in the files; they begin at byte `offset` of the destination."""
        info = self.info
        if self.slice is None:
            yield Extent(info.shard, info.start, info.nbytes, offset)
            return
        whole = torch_shape(info.dtype, info.shape)
        dim = self.slice.dim % len(whole)
        run_bytes = math.prod(self.shape[dim:]) * TORCH[info.dtype].itemsize
        stride_bytes = run_bytes * self.slice.world_size
        start = info.start + self.slice.rank * run_bytes
        count = math.prod(whole[:dim])
        if run_bytes and count > 1 and run_bytes < RUN_BYTES:
            yield Extent(info.shard, start, self.nbytes, offset, runs=Runs(run_bytes, stride_bytes))
            return
        for run in range(count if run_bytes else 0):
            yield Extent(info.shard, start + run * stride_bytes, run_bytes, offset + run * run_bytes)


def select(
    checkpoint: Checkpoint,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    slices: Mapping[str, Slice] | None = None,
) -> list[Wanted]:
    """The tensors whose names match one of `include` (none: all) and none of `exclude`, in the order of the files.

    These and the keys of `slices` are names with shell wildcards (`*.q_proj.weight`); the first that matches counts.
    Raises UnsupportedCheckpoint for a tensor that torch can't hold, or that a slice does not divide.
    """
    wanted = []
    for info in checkpoint.tensors.values():
        if (include and not _matches(info.name, include)) or _matches(info.name, exclude):
            continue
        if info.dtype not in TORCH or any(size > _MAX_SIZE for size in info.shape):
            raise _unsupported(checkpoint, info, "torch has no tensor of")
        shape = torch_shape(info.dtype, info.shape)
        part = next((part for name, part in (slices or {}).items() if fnmatchcase(info.name, name)), None)
        wanted.append(Wanted(info, shape if part is None else _sliced(checkpoint, info, shape, part), part))
    return wanted


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sliced(checkpoint: Checkpoint, info: TensorInfo, shape: tuple[int, ...], part: Slice) -> tuple[int, ...]:
    if not 0 <= part.rank < part.world_size:
        raise ValueError(f"rank {part.rank} of {part.world_size}")
    if not -len(shape) <= part.dim < len(shape) or shape[part.dim] % part.world_size:
        raise _unsupported(
            checkpoint, info, f"dimension {part.dim} is not there, or not {part.world_size} equal parts, of"
        )
    sizes = list(shape)
    sizes[part.dim] //= part.world_size
    return tuple(sizes)


def _unsupported(checkpoint: Checkpoint, info: TensorInfo, why: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"{why} dtype {info.dtype} and shape {list(info.shape)}",
        file=str(checkpoint.shards[info.shard].path),
        tensor=info.name,
    )
