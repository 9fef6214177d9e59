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
class Part:
    """From `begin` to `end` along dimension `dim`, not negative, as torch counts."""

    dim: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor as it is to be: `shape` is torch's, of the part where there is one."""

    info: TensorInfo
    shape: tuple[int, ...]
    part: Part | None = None

    @classmethod
    def of(cls, info: TensorInfo, part: Part | None = None) -> Wanted:
        shape = list(torch_shape(info.dtype, info.shape))
        if part is not None:
            shape[part.dim] = part.end - part.begin
        return cls(info, tuple(shape), part)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH[self.info.dtype].itemsize

    def extents(self, offset: int) -> Iterator[Extent]:
        """Its bytes in the files; they begin at byte `offset` of the destination."""
        info, part = self.info, self.part
        if part is None:
            yield Extent(info.shard, info.start, info.nbytes, offset)
            return
        whole, dim = torch_shape(info.dtype, info.shape), part.dim
        row_bytes = math.prod(whole[dim + 1 :]) * TORCH[info.dtype].itemsize
        run_bytes, stride_bytes = (part.end - part.begin) * row_bytes, whole[dim] * row_bytes
        start = info.start + part.begin * row_bytes
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
        share = next((share for name, share in (slices or {}).items() if fnmatchcase(info.name, name)), None)
        wanted.append(Wanted.of(info, None if share is None else _part(checkpoint, info, share)))
    return wanted


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _part(checkpoint: Checkpoint, info: TensorInfo, share: Slice) -> Part:
    if not 0 <= share.rank < share.world_size:
        raise ValueError(f"rank {share.rank} of {share.world_size}")
    shape = torch_shape(info.dtype, info.shape)
    if not -len(shape) <= share.dim < len(shape) or shape[share.dim] % share.world_size:
        raise _unsupported(
            checkpoint, info, f"dimension {share.dim} is not there, or not {share.world_size} equal parts, of"
        )
    size = shape[share.dim] // share.world_size
    return Part(share.dim % len(shape), share.rank * size, (share.rank + 1) * size)


def _unsupported(checkpoint: Checkpoint, info: TensorInfo, why: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"{why} dtype {info.dtype} and shape {list(info.shape)}",
        file=str(checkpoint.shards[info.shard].path),
        tensor=info.name,
    )
