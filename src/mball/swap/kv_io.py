"""Blocks read from a store and written to it, several at a time by threads: what every tier over one does alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mball.errors import SwapMiss
from mball.swap.block_store import BlockStore
from mball.swap.book import Want
from mball.swap.place import Place
from mball.swap.threads import Call


class Run(Protocol):
    """Does all calls; raises TimeoutError where one hangs, Cancelled where there are no threads any more."""

    def __call__(self, calls: Sequence[Call], *, reading: bool) -> object: ...


@dataclass(frozen=True, slots=True)
class Written:
    """`places` were written, and `entries` of them are the store's now. `lost`, by number, were refused or failed, of
    them `refused` by the store."""

    places: list[Place]
    entries: int
    lost: list[int]
    refused: int


def read_blocks(
    store: BlockStore, places: Sequence[Place], nbytes: int, read: Callable[[int], int], run: Run
) -> dict[int, SwapMiss | OSError]:
    """Those that could not be read, by number: the store has been told. `read(n)` reads one, in a thread, and raises
    SwapMiss or OSError; it is not called for one that is not of `nbytes`."""
    misses: dict[int, SwapMiss | OSError] = {}

    def each(number: int) -> int:
        if (found := places[number].nbytes) != nbytes:
            misses[number] = SwapMiss("stale", f"a block of {found} bytes, not {nbytes}")
            return 0
        try:
            return read(number)
        except (SwapMiss, OSError) as error:
            misses[number] = error
            return 0

    run([functools.partial(each, number) for number in range(len(places))], reading=True)
    for number, miss in misses.items():
        if isinstance(miss, SwapMiss):
            store.missed(places[number], miss)
    return misses


def write_blocks(store: BlockStore, wants: Sequence[Want], content: Callable[[int], memoryview], run: Run) -> Written:
    """`content(n)` is asked for, in a thread, where block n is to be written. Raises SwapRefused."""
    leased = store.lease(wants)
    pairs = [(place, number) for number, place in enumerate(leased) if place is not None]
    errors: dict[int, OSError] = {}

    def each(place: Place, number: int) -> int:
        try:
            return store.slots.write(place, content(number))
        except OSError as error:
            errors[number] = error
            return 0

    run([functools.partial(each, *pair) for pair in pairs], reading=False)
    for place, number in pairs:
        if number in errors:
            store.abandon([place], errors[number])
    written = [place for place, number in pairs if number not in errors]
    entries = store.commit(written) if written else 0
    lost = [*sorted(errors), *range(len(leased), len(wants))]
    return Written(written, entries, lost, len(wants) - len(leased))
