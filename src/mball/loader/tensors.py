"""A checkpoint as plain tensors."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mball.loader.checkpoint import Checkpoint
from mball.loader.dtypes import TORCH
from mball.loader.fill import Options, fill
from mball.loader.hub import resolve
from mball.loader.paths import EVERY_WAY, Way
from mball.loader.plan import Extent, aligned
from mball.loader.selection import Slice, Wanted, select
from mball.loader.slab import open_slab
from mball.loader.workers import Progress
from mball.units import MiB

if TYPE_CHECKING:
    from mball.loader.manifest import Manifest

STREAM_BYTES = 256 * MiB


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    *,
    threads: int | None = None,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    slices: Mapping[str, Slice] | None = None,
    ways: Collection[Way] = EVERY_WAY,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    verify: Manifest | None = None,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of a folder's shards or of a model on the Hugging Face hub.

    Dtypes and shapes are as stored (F4 tensors are torch's packed pairs, with half the last dimension). The tensors own
    their memory (one slab that they share; it goes with the last of them): what happens to the files afterwards changes
    nothing.

    `include` and `exclude` are names with shell wildcards. `slices` maps such names to the share that a rank of a
    tensor-parallel group keeps: those bytes alone are read. `threads`: None for what the machine has. `ways` are those
    that the bytes may take to a GPU. With `verify`, the manifest beside the model (`Manifest.open`), every byte is
    checked on the way in; not together with `slices`.

    Raises a CheckpointError, SourceUnavailable, DeviceOutOfMemory, Cancelled, TimeoutError. Then nothing is held.
    """
    if verify is not None and slices:
        raise ValueError("a slice is not checked against a manifest: leave out verify or slices")
    checkpoint = Checkpoint.open(resolve(path_or_hub_id))
    wanted = select(checkpoint, include, exclude, slices)
    return _load(checkpoint, wanted, torch.device(device), Options(threads, ways, progress, cancel, verify))


def stream(
    source: str | Path | Checkpoint,
    device: str | torch.device = "cpu",
    *,
    threads: int | None = None,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    slices: Mapping[str, Slice] | None = None,
    group_bytes: int = STREAM_BYTES,
    by_name: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors one by one, in the order of the files (`by_name`: of their names in each), while the next are
    being loaded.

    `source` is a path, a hub id, or a checkpoint that was opened. About `group_bytes` at a time share one memory of
    their own, which goes with the last of them; two such groups are there beside what the caller keeps. Raises what
    `load` raises, when the tensor's turn comes.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(resolve(source))
    wanted = select(checkpoint, include, exclude, slices)
    if by_name:
        wanted.sort(key=lambda tensor: (tensor.info.shard, tensor.info.name))
    groups = _groups(wanted, group_bytes)
    cancel = threading.Event()
    options = Options(threads, cancel=cancel)
    with ThreadPoolExecutor(1, thread_name_prefix="mball-stream") as pool:
        try:
            ahead = [pool.submit(_load, checkpoint, group, torch.device(device), options) for group in groups[:1]]
            for number in range(len(groups)):
                tensors = ahead.pop().result()
                ahead = [
                    pool.submit(_load, checkpoint, group, torch.device(device), options)
                    for group in groups[number + 1 : number + 2]
                ]
                while tensors:
                    name = next(iter(tensors))
                    yield name, tensors.pop(name)
        finally:
            cancel.set()


def _groups(wanted: Sequence[Wanted], group_bytes: int) -> list[list[Wanted]]:
    groups: list[list[Wanted]] = []
    room = 0
    for tensor in wanted:
        if not groups or tensor.nbytes > room:
            groups.append([])
            room = group_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return groups


def _load(
    checkpoint: Checkpoint, wanted: Sequence[Wanted], device: torch.device, options: Options
) -> dict[str, Tensor]:
    tensors = load_parts(checkpoint, wanted, device, options)
    return {tensor.info.name: loaded for tensor, loaded in zip(wanted, tensors, strict=True)}


def load_parts(
    checkpoint: Checkpoint, wanted: Sequence[Wanted], device: torch.device, options: Options
) -> list[Tensor]:
    """What `select` found, or parts of the same tensors, in one memory. Raises what `load` raises."""
    offsets: list[int] = []
    extents: list[Extent] = []
    nbytes = 0
    for tensor in wanted:
        offsets.append(aligned(nbytes))
        extents.extend(tensor.extents(offsets[-1]))
        nbytes = offsets[-1] + tensor.nbytes
    slab = open_slab(nbytes, device)
    with ExitStack() as undo:
        slab.populate()
        undo.callback(slab.release)
        tensors = [
            slab.view(offset, tensor.shape, TORCH[tensor.info.dtype])
            for tensor, offset in zip(wanted, offsets, strict=True)
        ]
        fill(extents, checkpoint, slab, options)
        undo.pop_all()
    return tensors
