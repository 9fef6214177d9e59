"""A checkpoint as a plain dict of tensors."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from mball.errors import UnsupportedCheckpoint
from mball.loader.checkpoint import Checkpoint, TensorInfo
from mball.loader.dtypes import TORCH, torch_shape
from mball.loader.manifest import Manifest
from mball.loader.plan import Extent, aligned, chunked
from mball.loader.reader import Progress, Source, read
from mball.loader.slab import open_slab

_MAX_SIZE = 2**63 - 1


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    threads: int = 2,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    verify: Manifest | None = None,
) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, or of a folder's shards, with dtypes and shapes as stored.

    The tensors own their memory (one slab that they share; it goes with the last of them): what happens to the files
    afterwards changes nothing. F4 tensors are torch's packed pairs, with half the last dimension.

    With `verify`, the manifest beside the model (`Manifest.open`), every byte is checked on the way in.

    Raises a CheckpointError, DeviceOutOfMemory, Cancelled, TimeoutError.
    """
    checkpoint = Checkpoint.open(path)
    offsets: dict[str, int] = {}
    nbytes = 0
    for info in checkpoint.tensors.values():
        _check(info, checkpoint)
        offsets[info.name] = aligned(nbytes)
        nbytes = offsets[info.name] + info.nbytes
    slab = open_slab(nbytes, torch.device(device))
    extents = chunked(
        Extent(info.shard, info.start, info.nbytes, offsets[info.name]) for info in checkpoint.tensors.values()
    )
    with ExitStack() as undo:
        slab.populate()
        undo.callback(slab.release)
        tensors = {
            info.name: slab.view(offsets[info.name], torch_shape(info.dtype, info.shape), TORCH[info.dtype])
            for info in checkpoint.tensors.values()
        }
        read(
            extents,
            Source(checkpoint),
            slab.lane,
            threads=threads,
            progress=progress,
            cancel=cancel,
            verify=verify.verifier(checkpoint) if verify is not None else None,
        )
        undo.pop_all()
    return tensors


def _check(info: TensorInfo, checkpoint: Checkpoint) -> None:
    if info.dtype not in TORCH or any(size > _MAX_SIZE for size in info.shape):
        raise UnsupportedCheckpoint(
            f"torch has no tensor of dtype {info.dtype} and shape {list(info.shape)}",
            file=str(checkpoint.shards[info.shard].path),
            tensor=info.name,
        )
