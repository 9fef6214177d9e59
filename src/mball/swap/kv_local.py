"""A store of this process's own, as a KV tier asks for one."""

from __future__ import annotations

from collections.abc import Sequence

from mball.errors import SwapMiss, SwapRefused
from mball.swap.book import Want
from mball.swap.place import Place
from mball.swap.slots import Slots
from mball.swap.store import SwapStore


class LocalBlocks:
    """A `BlockStore` over a `SwapStore`, which stays the caller's."""

    def __init__(self, store: SwapStore, owner: str) -> None:
        self._store = store
        self._owner = owner

    @property
    def slots(self) -> Slots:
        return self._store.slots

    def find(self, keys: Sequence[bytes], model: bytes) -> list[Place]:
        found: list[Place] = []
        for key in keys:
            try:
                found.append(self._store.find(key, model))
            except SwapMiss:
                break
        return found

    def missed(self, place: Place, miss: SwapMiss) -> None:
        self._store.missed(place, miss)

    def lease(self, wants: Sequence[Want]) -> list[Place | None]:
        places: list[Place | None] = []
        for want in wants:
            try:
                lease = self._store.lease(self._owner, want)
            except SwapRefused:
                if not places:
                    raise
                break
            places.append(None if lease is None else lease.place)
        return places

    def commit(self, places: Sequence[Place]) -> int:
        return self._store.commit(self._owner, [place.generation for place in places])

    def abandon(self, places: Sequence[Place], error: OSError | None = None) -> None:
        for place in places:
            if error is None:
                self._store.abandon(self._owner, place.generation)
            else:
                self._store.failed(self._owner, place.generation, error)
