"""A worker's swap store: it reads and writes slots itself, and asks its manager which."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from mball.errors import MballError, SwapMiss, SwapRefused, VerbFailed
from mball.memory.control import MESSAGE_BYTES, Asker, ChannelClosed, Message
from mball.memory.swap_limits import MOST_KEYS, MOST_LEASES, MOST_SLOTS, MOST_WANTS
from mball.swap.book import Want
from mball.swap.place import Extent, Place
from mball.swap.slots import Slots

_ROOM_BYTES = MESSAGE_BYTES // 2
"""For what is asked for in one message; the rest is for what surrounds it."""

_MARGIN_S = 1.0


class RemoteBlockStore:
    """A `mball.swap.block_store.BlockStore`. Its methods belong to any thread but that of `loop`."""

    def __init__(self, slots: Slots, asker: Asker, loop: asyncio.AbstractEventLoop, deadline_s: float = 15.0) -> None:
        self._slots = slots
        self._asker = asker
        self._loop = loop
        self._deadline_s = deadline_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """By the thread of `loop` before that ends, and after `asker`: an ended loop never begins what it is handed.
        Whoever asks from now on is told at once instead of waiting for the deadline. Idempotent."""
        with self._asking:
            self._closed = True

    @property
    def slots(self) -> Slots:
        return self._slots

    def find(self, keys: Sequence[bytes], model: bytes) -> list[Place]:
        found: list[Place] = []
        while len(found) < len(keys):
            asked = keys[len(found) : len(found) + MOST_KEYS]
            try:
                answer = self._ask("swap.find", model=model.hex(), keys=[key.hex() for key in asked])
                places = [
                    Place(key, model, int(generation), int(nbytes), _extents(extents))
                    for key, (generation, nbytes, extents) in zip(asked, answer["places"], strict=False)
                ]
            except _FAILURES:
                break
            found += places
            if len(places) < len(asked) and not (places and answer.get("more")):
                break
        return found

    def missed(self, place: Place, miss: SwapMiss) -> None:
        try:
            self._ask("swap.missed", key=place.key.hex(), generation=place.generation, reason=miss.reason)
        except _FAILURES:
            return

    def lease(self, wants: Sequence[Want]) -> list[Place | None]:
        places: list[Place | None] = []
        for batch in self._batches(wants):
            try:
                granted, refused = self._lease(batch)
            except _FAILURES as error:
                granted, refused = [], SwapRefused("busy", str(error) or type(error).__name__)
            places += granted
            if refused is not None and not places:
                raise refused
            if refused is not None:
                break
        return places

    def commit(self, places: Sequence[Place]) -> int:
        count = 0
        for at in range(0, len(places), MOST_LEASES):
            leases = [place.generation for place in places[at : at + MOST_LEASES]]
            try:
                answer = self._ask("swap.commit", leases=leases)
            except _FAILURES as error:
                raise SwapRefused("busy", str(error) or type(error).__name__) from None
            if (refused := answer.get("refused")) is not None:
                raise SwapRefused(*map(str, refused))
            count += int(answer["entries"])
        return count

    def abandon(self, places: Sequence[Place], error: OSError | None = None) -> None:
        for at in range(0, len(places), MOST_LEASES):
            leases = [place.generation for place in places[at : at + MOST_LEASES]]
            try:
                self._ask("swap.abandon", leases=leases, errno=None if error is None else error.errno)
            except _FAILURES:
                return

    def _lease(self, wants: Sequence[Want]) -> tuple[list[Place | None], SwapRefused | None]:
        answer = self._ask(
            "swap.lease", self._unclaimed, model=wants[0].model.hex(), wants=[_want(want) for want in wants]
        )
        places = [
            None if place is None else Place(want.key, want.model, int(place[0]), want.nbytes, _extents(place[1]))
            for want, place in zip(wants, answer["places"], strict=False)
        ]
        refused = answer.get("refused")
        return places, None if refused is None else SwapRefused(*map(str, refused))

    def _batches(self, wants: Sequence[Want]) -> Iterator[list[Want]]:
        """Of one model each, and no larger than the manager takes."""
        batch: list[Want] = []
        nbytes = slots = 0
        for want in wants:
            more_bytes = len(json.dumps(_want(want)))
            more_slots = self._slots.layout.slots_for(want.nbytes)
            full = len(batch) == MOST_WANTS or nbytes + more_bytes > _ROOM_BYTES or slots + more_slots > MOST_SLOTS
            if batch and (full or want.model != batch[0].model):
                yield batch
                batch, nbytes, slots = [], 0, 0
            batch.append(want)
            nbytes, slots = nbytes + more_bytes, slots + more_slots
        if batch:
            yield batch

    def _unclaimed(self, answer: Message) -> None:
        """On the loop: leases that came too late for whoever asked go back."""
        leases = [place[0] for place in answer.get("places", []) if place is not None]
        task = self._loop.create_task(self._give_back(leases), name="swap leases back")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_back(self, leases: list[int]) -> None:
        try:
            await self._asker.call("swap.abandon", deadline_s=self._deadline_s, leases=leases)
        except (MballError, TimeoutError):
            return

    def _ask(self, verb: str, on_late: Callable[[Message], None] = lambda _: None, **arguments: Any) -> Message:
        with self._asking:
            if self._closed:
                raise ChannelClosed(f"{verb}: the way to the store is closed")
            call = self._asker.call(verb, deadline_s=self._deadline_s, on_late=on_late, **arguments)
            try:
                future = asyncio.run_coroutine_threadsafe(call, self._loop)
            except RuntimeError:  # the loop is gone
                call.close()
                raise
        try:
            return future.result(self._deadline_s + _MARGIN_S)
        except TimeoutError:
            future.cancel()
            raise


def _want(want: Want) -> Message:
    parent = None if want.parent is None else want.parent.hex()
    return {
        "key": want.key.hex(),
        "nbytes": want.nbytes,
        "saved_s": want.saved_s,
        "rate": want.rate,
        "parent": parent,
    }


def _extents(said: Any) -> tuple[Extent, ...]:
    return tuple(Extent(int(first), int(slots)) for first, slots in said)


_FAILURES = (
    VerbFailed,
    ChannelClosed,
    CancelledError,
    TimeoutError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
)
"""A manager that is gone, does not answer in time, refuses, or says what was not agreed."""
