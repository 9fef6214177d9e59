"""What workers ask of the swap store, over their control channels.

A worker has the store's descriptor, and reads and writes slots itself; which ones, it is told here:

    swap.find     {"model": …, "keys": […]}        → {"places": [[generation, nbytes, [[first, slots], …]], …],
                                                      "more": true where the rest is to be asked for again}
    swap.lease    {"model": …, "wants": [{…}, …]}  → {"places": [[generation, [[first, slots], …]] or null, …],
                                                      "refused": [reason, message] where it was not all granted}
    swap.commit   {"leases": [generation, …]}      → {"entries": …}
    swap.abandon  {"leases": […], "errno": …}      → {}
    swap.missed   {"key": …, "generation": …, "reason": …}  → {}

Keys and models are SHA-256s in hexadecimal. Whoever says anything else is refused, and nothing of it is done.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mball.errors import SwapMiss, SwapRefused, TransitionError
from mball.memory.control import Answer, Message
from mball.memory.process import WorkerProcess
from mball.memory.swap_keeper import SwapKeeper
from mball.memory.swap_limits import MOST_KEYS, MOST_LEASES, MOST_SLOTS, MOST_WANTS
from mball.swap.book import Want
from mball.swap.index import Kind
from mball.swap.place import Place
from mball.swap.service import SwapService

_log = structlog.get_logger(__name__)

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Request(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Find(_Request):
    model: _Digest
    keys: Annotated[list[_Digest], Field(max_length=MOST_KEYS)]


class _Want(_Request):
    key: _Digest
    nbytes: Annotated[int, Field(gt=0)]
    saved_s: _Seconds
    rate: _Seconds
    parent: _Digest | None = None


class _Lease(_Request):
    model: _Digest
    wants: Annotated[list[_Want], Field(max_length=MOST_WANTS)]


class _Leases(_Request):
    leases: Annotated[list[int], Field(max_length=MOST_LEASES)]


class _Abandon(_Leases):
    errno: int | None = None


class _Missed(_Request):
    key: _Digest
    generation: int
    reason: Literal["checksum", "stale", "io"]


class SwapBroker:
    """`deadline_s`: how long the disk may take for one call."""

    def __init__(self, keeper: SwapKeeper, deadline_s: float) -> None:
        self._keeper = keeper
        self._deadline_s = deadline_s
        self._live: set[str] = set()

    async def introduce(self, worker: WorkerProcess) -> None:
        """Gives a worker the store, where there is one. A worker that can't take it goes on without."""
        service = self._keeper.service
        if service is None or worker.has_swap:
            return
        worker.has_swap = True
        try:
            fd = service.store.worker_fd()
            try:
                said = service.store.slots.to_wire()
                await worker.call("swap", deadline_s=self._deadline_s, fd=fd, slots=said)
            finally:
                os.close(fd)
        except (TransitionError, OSError) as error:
            _log.warning("worker without the swap store", model=worker.spec.model, error=str(error))

    def answers(self, owner: str) -> Answer:
        """What takes the calls of one worker, from before its start to `gone`."""
        self._live.add(owner)

        async def answer(message: Message) -> Message:
            service = self._keeper.service
            if service is None or owner not in self._live:
                raise TransitionError("there is no swap store")
            try:
                return await self._answer(service, owner, message)
            except ValidationError as error:
                part = error.errors()[0]
                where = ".".join(map(str, part["loc"]))
                raise TransitionError(f"{message.get('verb')}: {where}: {part['msg']}") from None

        return answer

    def gone(self, owner: str) -> None:
        """Its process has ended: its leases return."""
        self._live.discard(owner)
        if self._keeper.service is not None and (count := self._keeper.service.store.release(owner)):
            _log.info("swap leases returned", owner=owner, leases=count)

    async def _answer(self, service: SwapService, owner: str, message: Message) -> Message:
        match message.get("verb"):
            case "swap.find":
                return _find(service, _Find.model_validate(message))
            case "swap.lease":
                return await self._lease(service, owner, _Lease.model_validate(message))
            case "swap.commit":
                leases = _Leases.model_validate(message).leases
                try:
                    return {"entries": await service.commit(owner, leases, deadline_s=self._deadline_s)}
                except SwapRefused as error:
                    return {"entries": 0, "refused": [error.reason, error.why]}
            case "swap.abandon":
                given_up = _Abandon.model_validate(message)
                for lease_id in given_up.leases:
                    if given_up.errno is None:
                        service.store.abandon(owner, lease_id)
                    else:
                        service.store.failed(owner, lease_id, OSError(given_up.errno, "said by a worker"))
                return {}
            case "swap.missed":
                missed = _Missed.model_validate(message)
                place = Place(bytes.fromhex(missed.key), b"", missed.generation, 0, ())
                service.store.missed(place, SwapMiss(missed.reason, f"read by {owner}"))
                return {}
            case verb:
                raise TransitionError(f"unknown verb {verb!r}")

    async def _lease(self, service: SwapService, owner: str, asked: _Lease) -> Message:
        slots = sum(service.store.layout.slots_for(want.nbytes) for want in asked.wants)
        if slots > MOST_SLOTS:
            raise TransitionError(f"swap.lease: {slots} slots in one call, {MOST_SLOTS} at most")
        model = bytes.fromhex(asked.model)
        wants = [_want(model, want) for want in asked.wants]
        try:
            leases = await service.lease(owner, wants, deadline_s=self._deadline_s)
        except SwapRefused as error:
            return {"places": [], "refused": [error.reason, error.why]}
        finally:
            if owner not in self._live:
                service.store.release(owner)
        places = [lease and [lease.place.generation, _extents(lease.place)] for lease in leases]
        short = {"refused": ["full", "the rest was refused"]} if len(leases) < len(wants) else {}
        return {"places": places, **short}


def _find(service: SwapService, asked: _Find) -> Message:
    """As many as one answer holds: `more` says that the rest is to be asked for again."""
    model = bytes.fromhex(asked.model)
    places: list[Any] = []
    slots = 0
    for key in asked.keys:
        try:
            place = service.store.find(bytes.fromhex(key), model)
        except SwapMiss:
            return {"places": places, "more": False}
        slots += len(place.extents)
        if slots > MOST_SLOTS:
            return {"places": places, "more": bool(places)}
        places.append([place.generation, place.nbytes, _extents(place)])
    return {"places": places, "more": False}


def _want(model: bytes, want: _Want) -> Want:
    parent = None if want.parent is None else bytes.fromhex(want.parent)
    return Want(Kind.BLOCK, bytes.fromhex(want.key), model, want.nbytes, want.saved_s, want.rate, parent)


def _extents(place: Place) -> list[list[int]]:
    return [list(extent) for extent in place.extents]
