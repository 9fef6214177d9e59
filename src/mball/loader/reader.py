"""Planned extents, read by several threads straight into the memory of their lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mball.loader.lanes import Lane
from mball.loader.plan import Extent
from mball.loader.source import Source
from mball.loader.workers import Progress, work_through

if TYPE_CHECKING:
    from mball.loader.verify import Verifier

__all__ = ["Progress", "Source", "read"]


def read(
    extents: Sequence[Extent],
    source: Source,
    open_lane: Callable[[], Lane],
    *,
    threads: int,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    verify: Verifier | None = None,
    when_idle: Callable[[], None] = lambda: None,
) -> int:
    """Read every extent, in about the order given; the bytes read. Closes the source.

    Raises the first failing thread's error (ReadError; DigestMismatch from `verify`; OSError from a FileLane),
    Cancelled, or TimeoutError where no byte arrives for long. Then no thread writes any more, unless its read hangs in
    the kernel; where none does, `when_idle` was called.
    """
    units = verify.units(extents) if verify is not None else [[extent] for extent in extents]

    def idle() -> None:
        # A descriptor closed under a hanging read could be another file's before that thread looks again.
        source.close()
        when_idle()

    return work_through(
        units,
        sum(extent.nbytes for extent in extents),
        lambda: _Reader(source, open_lane(), verify),
        threads=max(1, min(threads, len(units))),
        progress=progress,
        cancel=cancel,
        when_idle=idle,
    )


class _Reader:
    """One thread's: reads units of extents into its lane, each unit checked as a whole."""

    def __init__(self, source: Source, lane: Lane, verify: Verifier | None) -> None:
        self._source = source
        self._lane = lane
        self._verify = verify

    def take(self, unit: Sequence[Extent]) -> int:
        check = self._verify.begin(unit, self._source) if self._verify is not None else None
        for extent in unit:
            buffer = self._lane.buffer(extent)
            self._source.read_extent(buffer, extent)
            if check is not None:
                check.update(extent, buffer)
            self._lane.commit(extent)
        if check is not None:
            check.end()
        return sum(extent.nbytes for extent in unit)

    def finish(self) -> None:
        self._lane.finish()
