"""One GPU, its host's DRAM and disk, in virtual time. Policies decide; here is what their decisions take."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mball.bench.simulate_fleet import (
    BUS_BYTES_S,
    CACHED_BYTES_S,
    CONTEXT_BYTES,
    DEMOTE_S,
    DEVICE_BYTES,
    DISK_BYTES_S,
    DRAM_BYTES,
    MOVE_S,
    SLOTS,
    STOP_S,
    Kind,
    Request,
    Traffic,
)
from mball.errors import TransitionError

Image = Literal["none", "filling", "ready"]


@dataclass(eq=False, slots=True)
class SimModel:
    """A model as it stands. `held_bytes` of the device are its own or promised to it."""

    number: int
    kind: Kind
    alive: bool = False
    starting: bool = False
    on_device: bool = False
    moving: bool = False
    arriving: bool = False
    is_open: bool = False
    image: Image = "none"
    held_bytes: int = 0
    inside: int = 0
    opened_s: float = 0.0
    started_s: float = 0.0
    used_s: float = 0.0
    gated_since_s: float | None = None
    swap_s: float = 0.0
    waiting: deque[tuple[float, float]] = field(default_factory=deque)

    @property
    def lacking_bytes(self) -> int:
        """Until it is on the device, or until its worker lives."""
        return max(0, (self.kind.needed_bytes if self.alive else CONTEXT_BYTES) - self.held_bytes)

    @property
    def promote_s(self) -> float:
        return self.kind.image_s if self.image == "ready" else self.kind.source_s


class Policy(Protocol):
    """`step` begins what it wants to begin, after every event; it returns at what time it wants to look again."""

    name: str

    def arrived(self, model: SimModel, now: float) -> None: ...

    def step(self, world: World, now: float) -> float: ...

    def images_for(self, world: World, model: SimModel, now: float) -> Sequence[SimModel] | None:
        """Whose images go for this model's: () where there is room, None where it gets none."""
        ...


@dataclass(slots=True)
class Result:
    """Of one run: each counted request's wait, and what the device did."""

    waits: list[float] = field(default_factory=list)
    promotions: int = 0
    starts: int = 0
    swap_byte_s: float = 0.0
    stay_byte_s: float = 0.0
    most_waiting: int = 0
    longest_service_s: float = 0.0

    @property
    def switching_share(self) -> float:
        """Of the device's memory × time, what went by while models came and went."""
        total = self.swap_byte_s + self.stay_byte_s
        return self.swap_byte_s / total if total else 0.0


class World:
    """Events in order of time. One transition at a time; starts run beside it; the disk serves one after another."""

    def __init__(self, kinds: Sequence[Kind], policy: Policy, traffic: Traffic) -> None:
        self.models = [SimModel(number, kind) for number, kind in enumerate(kinds)]
        self.free_bytes = DEVICE_BYTES
        self.dram_free_bytes = DRAM_BYTES
        self.busy = False
        self.starting = 0
        self.now = 0.0
        self.result = Result()
        self._policy = policy
        self._traffic = traffic
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._disk_free_s = 0.0

    def run(self, requests: Sequence[Request]) -> Result:
        """Until every request has been answered. Raises TransitionError where a policy lets that never happen."""
        for request in requests:
            self._at(request.at_s, lambda request=request: self._arrive(request))  # type: ignore[misc]
        last = requests[-1].at_s + 3600.0 if requests else 0.0
        look_s = float("inf")
        while self._events:
            at_s = self._events[0][0]
            if look_s < at_s:
                self.now = max(self.now, look_s)
            else:
                self.now, _, happen = heapq.heappop(self._events)
                happen()
            if self.now > last:
                raise TransitionError(f"{self._policy.name}: requests are never served")
            # The least step keeps a policy that asks for "now" from stopping time.
            look_s = max(self.now + 1e-3, self._policy.step(self, self.now))
            if not self._events and any(model.waiting for model in self.models):
                self._at(look_s if look_s < float("inf") else last + 1, lambda: None)
        return self.result

    def promise(self, model: SimModel, nbytes: int) -> None:
        """Raises TransitionError where the device has no room: no policy may count on more than there is."""
        self.free_bytes += model.held_bytes - nbytes
        model.held_bytes = nbytes
        if self.free_bytes < 0:
            raise TransitionError(f"{self._policy.name}: {model.kind.name} exceeds the device by {-self.free_bytes}")

    def start(self, model: SimModel) -> None:
        self.promise(model, CONTEXT_BYTES)
        model.starting = model.moving = True
        self.starting += 1
        self.result.starts += 1
        self._in(model.kind.start_s, lambda: self._started(model))

    def bring(
        self, model: SimModel, *, demote: Sequence[SimModel], stop: Sequence[SimModel], drop: Sequence[SimModel] = ()
    ) -> None:
        """A transition: those leave, then this one's worker starts, or its weights come in."""
        self.busy = True
        model.moving = model.arriving = True
        took = 0.0
        for victim in (*demote, *stop):
            self._check_idle(victim)
            victim.moving, victim.is_open, victim.gated_since_s = True, False, None
        took = sum(DEMOTE_S for victim in demote) + sum(
            STOP_S + (DEMOTE_S if victim.on_device else 0) for victim in stop
        )
        for victim in drop:
            self.drop(victim)
        self._in(took, lambda: self._made_room(model, demote, stop))

    def demote(self, model: SimModel) -> None:
        self._check_idle(model)
        self.busy = model.moving = True
        model.is_open, model.gated_since_s = False, None

        def done() -> None:
            self._left(model)
            self.busy = model.moving = False

        self._in(DEMOTE_S, done)

    def fill(self, model: SimModel, drop: Sequence[SimModel] = ()) -> None:
        """From the disk, beside everything else."""
        for victim in drop:
            self.drop(victim)
        self._fill(model, self._disk_s(model.kind.weights_bytes))

    def drop(self, model: SimModel) -> None:
        model.image = "none"
        self.dram_free_bytes += model.kind.weights_bytes

    def shut(self, model: SimModel) -> None:
        if model.gated_since_s is None:
            model.gated_since_s, model.is_open = self.now, False

    def reopen(self, model: SimModel) -> None:
        model.gated_since_s = None
        if model.on_device and not model.moving:
            model.is_open = True
            self._let_in(model)

    def _arrive(self, request: Request) -> None:
        model = self.models[request.model]
        self._policy.arrived(model, self.now)
        model.used_s = self.now
        model.waiting.append((self.now, request.service_s))
        self.result.longest_service_s = max(self.result.longest_service_s, request.service_s)
        self._let_in(model)
        waiting = sum(1 for other in self.models if other.waiting and not other.is_open)
        self.result.most_waiting = max(self.result.most_waiting, waiting)

    def _let_in(self, model: SimModel) -> None:
        while model.is_open and model.waiting and model.inside < SLOTS:
            arrived_s, service_s = model.waiting.popleft()
            model.inside += 1
            model.used_s = self.now
            if arrived_s >= self._traffic.warm_s:
                self.result.waits.append(self.now - arrived_s)
            self._in(service_s, lambda: self._leave(model))

    def _leave(self, model: SimModel) -> None:
        model.inside -= 1
        model.used_s = self.now
        self._let_in(model)

    def _started(self, model: SimModel) -> None:
        model.starting = model.moving = False
        model.alive = True
        model.started_s = self.now
        self.starting -= 1

    def _made_room(self, model: SimModel, demote: Sequence[SimModel], stop: Sequence[SimModel]) -> None:
        for victim in (*demote, *stop):
            if victim.on_device:
                self._left(victim)
            victim.moving = False
        for victim in stop:
            victim.alive = False
            self.promise(victim, 0)
        if not model.alive:
            self.busy = model.arriving = False
            self.start(model)
            return
        self.promise(model, model.kind.needed_bytes)
        from_image = model.image == "ready"
        copy_s = model.kind.weights_bytes / BUS_BYTES_S
        load_s = copy_s if from_image else max(copy_s, self._disk_s(model.kind.weights_bytes))
        model.swap_s = MOVE_S + load_s + DEMOTE_S
        self._in(MOVE_S + load_s, lambda: self._promoted(model, from_image))

    def _promoted(self, model: SimModel, from_image: bool) -> None:
        self.busy = model.moving = model.arriving = False
        model.on_device = model.is_open = True
        model.opened_s = model.used_s = self.now
        self.result.promotions += 1
        self._let_in(model)
        if not from_image and model.image == "none":
            drops = self._policy.images_for(self, model, self.now)
            if drops is not None:
                for victim in drops:
                    self.drop(victim)
                self._fill(model, model.kind.weights_bytes / CACHED_BYTES_S)

    def _left(self, model: SimModel) -> None:
        nbytes = model.held_bytes - CONTEXT_BYTES
        self.result.swap_byte_s += model.swap_s * nbytes
        self.result.stay_byte_s += (self.now - model.opened_s) * nbytes
        model.on_device = False
        self.promise(model, CONTEXT_BYTES)

    def _fill(self, model: SimModel, took_s: float) -> None:
        self.dram_free_bytes -= model.kind.weights_bytes
        if self.dram_free_bytes < 0:
            raise TransitionError(f"{self._policy.name}: images exceed DRAM by {-self.dram_free_bytes}")
        model.image = "filling"

        def done() -> None:
            model.image = "ready"

        self._in(took_s, done)

    def _disk_s(self, nbytes: int) -> float:
        self._disk_free_s = max(self.now, self._disk_free_s) + nbytes / DISK_BYTES_S
        return self._disk_free_s - self.now

    def _check_idle(self, model: SimModel) -> None:
        if model.inside or model.moving:
            raise TransitionError(f"{self._policy.name}: {model.kind.name} is in use ({model.inside} in flight)")

    def _at(self, at_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), happen))

    def _in(self, seconds: float, happen: Callable[[], None]) -> None:
        self._at(self.now + seconds, happen)
