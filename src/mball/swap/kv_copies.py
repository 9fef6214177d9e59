"""Copies of KV blocks between a pool on the device and the arena: at once on the CPU, beside computing on a GPU.

On a GPU one stream of its own carries them in order. It waits, on the device, for what was computed before; and what is
computed next waits, on the device, for a copy whose block it needs. The thread that steps waits for nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from mball.device.cuda import CudaMark, Mark, new_stream

Pairs = Sequence[tuple[int, int]]


class Copies(Protocol):
    """Used by the thread that computes, or while none does. Rows are one block each, of equal bytes."""

    def out(self, pairs: Pairs) -> Mark | None:
        """(block, slot) each: blocks to the arena. They may be computed into again after `order`. The mark is behind
        the copies; None: they are done."""

    def back(self, pairs: Pairs) -> Mark | None:
        """(block, slot) each: from the arena; what is computed next finds them there."""

    def order(self, blocks: Iterable[int]) -> None:
        """What is computed next may write to these blocks."""

    def stamp(self) -> Any:
        """A point in what is computed, for `seconds`."""

    def seconds(self, first: Any, second: Any) -> float | None:
        """From one stamp to the other; None while that is not known yet."""

    def loads(self) -> list[tuple[int, float]]:
        """Bytes and seconds of each `back` that ended since."""

    def drain(self) -> None:
        """Waits until every copy has ended."""


class HostCopies:
    def __init__(self, pool: Tensor, arena: Tensor) -> None:
        self._pool, self._arena = pool, arena
        self._loads: list[tuple[int, float]] = []

    def out(self, pairs: Pairs) -> None:
        for block, slot in pairs:
            self._arena[slot].copy_(self._pool[block])

    def back(self, pairs: Pairs) -> None:
        began = time.perf_counter()
        for block, slot in pairs:
            self._pool[block].copy_(self._arena[slot])
        self._loads.append((len(pairs) * self._pool.shape[1], time.perf_counter() - began))

    def order(self, blocks: Iterable[int]) -> None:
        """They are done."""

    def stamp(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def loads(self) -> list[tuple[int, float]]:
        ended, self._loads = self._loads, []
        return ended

    def drain(self) -> None:
        """They are done."""


class CudaCopies:
    """`piece`: rows of the arena that are registered together; no copy goes over their border."""

    def __init__(self, pool: Tensor, arena: Tensor, piece: int) -> None:
        self._pool, self._arena, self._piece = pool, arena, piece
        self._device = pool.device
        self._stream = _stream_of(self._device)
        self._leaving: dict[int, CudaMark] = {}
        self._loading: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def out(self, pairs: Pairs) -> CudaMark:
        self._follow()
        with torch.cuda.stream(self._stream):
            for block, slot, count in self._runs(pairs):
                self._arena[slot : slot + count].copy_(self._pool[block : block + count], non_blocking=True)
        mark = self._mark()
        for block, _ in pairs:
            self._leaving[block] = mark
        return mark

    def back(self, pairs: Pairs) -> CudaMark:
        self._follow()
        begun = self._timed(self._stream)
        with torch.cuda.stream(self._stream):
            for block, slot, count in self._runs(pairs):
                self._pool[block : block + count].copy_(self._arena[slot : slot + count], non_blocking=True)
        self._loading.append((len(pairs) * self._pool.shape[1], begun, self._timed(self._stream)))
        mark = self._mark()
        torch.cuda.current_stream(self._device).wait_event(mark.event)
        return mark

    def order(self, blocks: Iterable[int]) -> None:
        marks = {id(mark): mark for block in blocks if (mark := self._leaving.pop(block, None)) is not None}
        for mark in marks.values():
            torch.cuda.current_stream(self._device).wait_event(mark.event)

    def stamp(self) -> torch.cuda.Event:
        return self._timed(torch.cuda.current_stream(self._device))

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float | None:
        return first.elapsed_time(second) / 1e3 if second.query() else None  # type: ignore[no-untyped-call]

    def loads(self) -> list[tuple[int, float]]:
        ended = []
        while self._loading and (seconds := self.seconds(*self._loading[0][1:])) is not None:
            ended.append((self._loading.popleft()[0], seconds))
        return ended

    def drain(self) -> None:
        self._mark().wait()

    def _runs(self, pairs: Pairs) -> list[tuple[int, int, int]]:
        # Rows with a gap between them would be gathered first, by a copy that is waited for.
        return runs(pairs, self._piece if self._arena.is_contiguous() else 1)

    def _follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _mark(self) -> CudaMark:
        mark = CudaMark()
        mark.event.record(self._stream)
        return mark

    def _timed(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for every pool that comes and goes."""
    return new_stream(device)


def runs(pairs: Pairs, piece: int) -> list[tuple[int, int, int]]:
    """(block, slot, count): rows that follow each other on both sides, within one piece of the arena."""
    found: list[tuple[int, int, int]] = []
    for block, slot in pairs:
        if found:
            first, begin, count = found[-1]
            if (block, slot) == (first + count, begin + count) and slot % piece:
                found[-1] = first, begin, count + 1
                continue
        found.append((block, slot, 1))
    return found
