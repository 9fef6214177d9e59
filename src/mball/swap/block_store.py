"""What a KV tier asks of a swap store, whether the store is its own or its manager's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mball.errors import SwapMiss
from mball.swap.book import Want
from mball.swap.place import Place
from mball.swap.slots import Slots


class BlockStore(Protocol):
    """Who has one reads and writes `slots` himself, at places that it was given. All methods block, within a deadline
    of the store's, and are thread-safe: the threads of a tier call them, never the one that steps an engine."""

    @property
    def slots(self) -> Slots: ...

    def find(self, keys: Sequence[bytes], model: bytes) -> list[Place]:
        """Where the first of these keys' blocks are, up to the first that is not there; counts as a use. A place may be
        another's by the time it is read: then reading is a miss."""

    def missed(self, place: Place, miss: SwapMiss) -> None:
        """Reading a place failed."""

    def lease(self, wants: Sequence[Want]) -> list[Place | None]:
        """Slots to write blocks to, None for each that is there already; fewer where the rest is refused.

        Raises SwapRefused where the first one is.
        """

    def commit(self, places: Sequence[Place]) -> int:
        """These are written; how many are entries now. Raises SwapRefused."""

    def abandon(self, places: Sequence[Place], error: OSError | None = None) -> None:
        """These leases are given back unwritten; `error`: writing failed with it."""
