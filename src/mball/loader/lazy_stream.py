"""A checkpoint's tensors for one of several ranks: what is used of them is read, and nothing else.

Which part of a tensor a rank keeps, only its model knows, where it cuts that part out. So a tensor is handed out before
it is read, and what is cut out of it is what is read. Those of the other layers, alike but for a number in their names,
are read ahead in the same parts; where they turn out to be used otherwise, they are read once more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import torch
from torch import Tensor

from mball.loader.checkpoint import Checkpoint, TensorInfo
from mball.loader.dtypes import TORCH, torch_shape
from mball.loader.fill import Options
from mball.loader.lazy import LazyTensor, Whole
from mball.loader.selection import Part, Wanted, select
from mball.loader.tensors import STREAM_BYTES, load_parts

_NUMBER = re.compile(r"\d+")

_Parts = tuple[Part | None, ...]
"""Of one tensor; None is all of it."""


class LazyStream:
    """Name and tensor in the order of the files and of the names in each; the next ones are read meanwhile.

    Two groups of `group_bytes` are there at most beside what the caller keeps. The memory is taken by another thread
    than the caller's. `read_bytes`: of tensors, so far; what lies between short pieces of rows is
    read with them, and not counted. A use of a tensor raises what `load` raises.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, group_bytes: int = STREAM_BYTES) -> None:
        """Raises UnsupportedCheckpoint."""
        self.read_bytes = 0
        self._checkpoint = checkpoint
        self._device = device
        self._group_bytes = group_bytes
        wanted = sorted(select(checkpoint), key=lambda tensor: (tensor.info.shard, tensor.info.name))
        self._infos = [tensor.info for tensor in wanted]
        self._learned: dict[tuple[str, str, tuple[int, ...]], _Parts] = {}

    def prove(self) -> None:
        """Reads the smallest tensor, so that what can't be read this way is known before any is handed out. Raises what
        `load` raises."""
        if self._infos:
            self._read(Wanted.of(min(self._infos, key=lambda info: info.nbytes)))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        cancel, at = Event(), 0
        with ThreadPoolExecutor(1, thread_name_prefix="mball-lazy") as pool:
            try:
                count, wanted = self._known(at)
                reading = pool.submit(self._load, wanted, cancel)
                while at < len(self._infos):
                    ahead = _by_name(wanted, reading.result())
                    infos = self._infos[at : at + max(1, count)]
                    at += len(infos)
                    count, wanted = self._known(at)
                    reading = pool.submit(self._load, wanted, cancel)
                    for info in infos:
                        yield from self._hand_out(info, ahead.pop(info.name, {}))
            finally:
                cancel.set()

    def _known(self, at: int) -> tuple[int, list[Wanted]]:
        """How many tensors from there on are of a kind that was seen, and what is read of them: a group."""
        count, room, wanted = 0, self._group_bytes, list[Wanted]()
        for info in self._infos[at:]:
            parts = self._learned.get(_kind(info))
            if parts is None or room <= 0:
                break
            wanted += [Wanted.of(info, part) for part in parts]
            room -= sum(each.nbytes for each in wanted[len(wanted) - len(parts) :])
            count += 1
        return count, wanted

    def _hand_out(self, info: TensorInfo, ahead: dict[Part | None, Tensor]) -> Iterator[tuple[str, Tensor]]:
        used: dict[Part | None, Tensor] = {}
        parts: list[Part | None] = []

        def fetch(part: Part | None) -> Tensor:
            if part not in used:
                there = ahead.pop(part, None)
                used[part] = self._read(Wanted.of(info, part)) if there is None else there
                # A loader may put tensors by, and use them once their layer is whole.
                parts.append(part)
                self._learned[_kind(info)] = tuple(parts)
            return used[part]

        shape, dtype = torch_shape(info.dtype, info.shape), TORCH[info.dtype]
        yield info.name, LazyTensor(Whole(fetch), shape, dtype, self._device)
        self._learned.setdefault(_kind(info), ())
        used.clear()

    def _read(self, wanted: Wanted) -> Tensor:
        with ThreadPoolExecutor(1, thread_name_prefix="mball-lazy-one") as one:
            [tensor] = one.submit(self._load, [wanted], Event()).result()
        return tensor

    def _load(self, wanted: list[Wanted], cancel: Event) -> list[Tensor]:
        self.read_bytes += sum(each.nbytes for each in wanted)
        return load_parts(self._checkpoint, wanted, self._device, Options(cancel=cancel))


def _kind(info: TensorInfo) -> tuple[str, str, tuple[int, ...]]:
    return _NUMBER.sub("#", info.name), info.dtype, tuple(info.shape)


def _by_name(wanted: Sequence[Wanted], tensors: Sequence[Tensor]) -> dict[str, dict[Part | None, Tensor]]:
    found: dict[str, dict[Part | None, Tensor]] = {}
    for each, tensor in zip(wanted, tensors, strict=True):
        found.setdefault(each.info.name, {})[each.part] = tensor
    return found
