"""What others do, on the same machine with the same means: sleeping workers, images, drains."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mball.bench.simulate_fleet import CONTEXT_BYTES, DEVICE_BYTES, Kind, Request
from mball.bench.simulate_world import SimModel, World

_LONG_S = 3.0
_STARTS = 2


@dataclass(frozen=True, slots=True)
class Ways:
    """What a rival may choose, and is tuned over.

    `patience_s`: when nothing idle makes room, busy ones are drained once the oldest has waited so long. `fill_first`:
    a load from the disk of more than 3 s goes through an image, beside other switches. `one_order`: sleeping workers
    and awake models leave in one order; otherwise awake ones go before any worker is stopped. `overtake`: while the
    oldest waits for a drain, others may take idle models' places. `ttl_s`: idle models
    leave by themselves. `pinned_share`: of the device, for the models with the most requests a byte, which
    leave only where all others are not enough.
    """

    patience_s: float = 2.0
    fill_first: bool = True
    one_order: bool = True
    overtake: bool = True
    ttl_s: float = float("inf")
    pinned_share: float = 0.0


Key = Callable[[SimModel, float], float]


def least_recently_used(model: SimModel, now: float) -> float:
    return model.used_s


def first_in_first_out(model: SimModel, now: float) -> float:
    return model.opened_s if model.on_device else model.started_s


@dataclass(slots=True)
class _Room:
    demote: list[SimModel] = field(default_factory=list)
    stop: list[SimModel] = field(default_factory=list)


class Evicting:
    """Requests in the order of their arrival; whoever has the least key leaves first. Others that need nobody's room
    go ahead of one that waits for it."""

    def __init__(self, name: str, key: Key, ways: Ways, pinned: Iterable[int] = ()) -> None:
        self.name = name
        self._key = key
        self._ways = ways
        self._pinned = frozenset(pinned)

    def arrived(self, model: SimModel, now: float) -> None:
        pass

    def step(self, world: World, now: float) -> float:
        again = self._expire(world, now)
        gates: set[int] = set()
        waiting = [m for m in world.models if m.waiting and not m.on_device]
        reserved = sum(m.lacking_bytes for m in world.models if m.arriving)
        first = True
        for model in sorted(waiting, key=lambda m: m.waiting[0][0]):
            if model.moving or model.image == "filling":
                continue
            if model.alive and (world.busy or self._fills(world, model, now)):
                continue
            if not model.alive and world.starting >= _STARTS:
                continue
            lacking = model.lacking_bytes + reserved - world.free_bytes
            may_evict = first or self._ways.overtake
            room = _Room() if lacking <= 0 else self._room(world, model, lacking, now) if may_evict else None
            if room is not None:
                self._begin(world, model, room)
                reserved += model.lacking_bytes if not model.alive or model.arriving else 0
                first = first and lacking <= 0
                continue
            if first:
                again = min(again, self._drain(world, model, lacking, now, gates))
                reserved += 0 if self._ways.overtake else model.lacking_bytes
            first = False
        for model in world.models:
            if model.number in gates:
                world.shut(model)
            elif model.gated_since_s is not None and not world.busy:
                world.reopen(model)
        return again

    def images_for(self, world: World, model: SimModel, now: float) -> Sequence[SimModel] | None:
        kept = sorted(
            (m for m in world.models if m.image == "ready" and not m.moving and m is not model),
            key=lambda m: (m.number in self._pinned, bool(m.waiting), self._key(m, now)),
        )
        return _until(kept, model.kind.weights_bytes - world.dram_free_bytes, lambda m: m.kind.weights_bytes)

    def _fills(self, world: World, model: SimModel, now: float) -> bool:
        if not self._ways.fill_first or model.image != "none" or model.promote_s <= _LONG_S:
            return False
        if any(other.image == "filling" and other.waiting for other in world.models):
            return True
        drops = self.images_for(world, model, now)
        if drops is None:
            return False
        world.fill(model, drops)
        return True

    def _begin(self, world: World, model: SimModel, room: _Room) -> None:
        if model.alive or (not world.busy and (room.demote or room.stop)):
            world.bring(model, demote=room.demote, stop=room.stop)
        elif not (room.demote or room.stop):
            world.start(model)

    def _others(self, world: World, model: SimModel, now: float, *, busy: bool) -> list[SimModel]:
        found = (
            m
            for m in world.models
            if m is not model and m.alive and not m.moving and m.image != "filling" and (busy or not m.inside)
        )
        return sorted(found, key=lambda m: (m.number in self._pinned, bool(m.waiting), self._key(m, now)))

    def _room(self, world: World, model: SimModel, lacking: int, now: float, *, busy: bool = False) -> _Room | None:
        others = self._others(world, model, now, busy=busy)
        awake = [m for m in others if m.on_device]
        asleep = [m for m in others if not m.on_device]
        order = others if self._ways.one_order else [*awake, *asleep]
        chosen = _until(order, lacking, _first_frees)
        if chosen is not None:
            return _Room([m for m in chosen if m.on_device], [m for m in chosen if not m.on_device])
        lacking -= sum(_first_frees(m) for m in others)
        stopped = _until(awake, lacking, lambda m: CONTEXT_BYTES)
        if stopped is None:
            return None
        return _Room([m for m in awake if m not in stopped], [*asleep, *stopped])

    def _drain(self, world: World, model: SimModel, lacking: int, now: float, gates: set[int]) -> float:
        waited = now - model.waiting[0][0]
        if waited < self._ways.patience_s:
            return now + self._ways.patience_s - waited
        room = self._room(world, model, lacking, now, busy=True)
        if room is not None:
            gates |= {m.number for m in (*room.demote, *room.stop) if m.on_device}
        return float("inf")

    def _expire(self, world: World, now: float) -> float:
        again = float("inf")
        for m in world.models:
            if m.on_device and not m.moving and not m.inside and not m.waiting and m.number not in self._pinned:
                left_s = m.used_s + self._ways.ttl_s - now
                if left_s > 0:
                    again = min(again, now + left_s)
                elif not world.busy:
                    world.demote(m)
        return again


class Clairvoyant(Evicting):
    """Knows every request to come: whoever is needed last leaves first, and the next one needed is brought in ahead."""

    def __init__(self, number: int, requests: Sequence[Request], ways: Ways) -> None:
        super().__init__("clairvoyant", lambda m, now: -self.next_s(m, now), ways)
        self._times: list[list[float]] = [[] for _ in range(number)]
        for request in requests:
            self._times[request.model].append(request.at_s)

    def next_s(self, model: SimModel, now: float) -> float:
        if model.waiting:
            return now
        times = self._times[model.number]
        place = bisect_right(times, now)
        return times[place] if place < len(times) else float("inf")

    def step(self, world: World, now: float) -> float:
        again = super().step(world, now)
        if not any(m.waiting and not m.on_device for m in world.models):
            self._look_ahead(world, now)
        return again

    def _look_ahead(self, world: World, now: float) -> None:
        absent = [m for m in world.models if not m.on_device and not m.moving and m.image != "filling"]
        for model in sorted(absent, key=lambda m: self.next_s(m, now)):
            if self.next_s(model, now) == float("inf") or (world.busy and model.alive):
                continue
            if not model.alive and world.starting >= _STARTS:
                continue
            reserved = sum(m.lacking_bytes for m in world.models if m.arriving)
            lacking = model.lacking_bytes + reserved - world.free_bytes
            room = _Room() if lacking <= 0 else self._room(world, model, lacking, now)
            if room is None or any(self.next_s(m, now) <= self.next_s(model, now) for m in (*room.demote, *room.stop)):
                continue
            if model.alive and self._fills(world, model, now):
                continue
            self._begin(world, model, room)


def placed(kinds: Sequence[Kind], requests: Sequence[Request], share: float) -> list[int]:
    """The models that get a place of their own within `share` of the device: most requests a byte first."""
    counts = [0] * len(kinds)
    for request in requests:
        counts[request.model] += 1
    room, chosen = share * DEVICE_BYTES, []
    for number in sorted(range(len(kinds)), key=lambda n: -counts[n] / kinds[n].needed_bytes):
        if kinds[number].needed_bytes <= room and counts[number]:
            chosen.append(number)
            room -= kinds[number].needed_bytes
    return chosen


def _first_frees(model: SimModel) -> int:
    """By being demoted, or stopped where it sleeps already."""
    return model.held_bytes - CONTEXT_BYTES if model.on_device else model.held_bytes


def _until(models: Sequence[SimModel], lacking: int, frees: Callable[[SimModel], int]) -> list[SimModel] | None:
    """The first that free enough, without those that turn out not to be needed; None where all do not."""
    chosen: list[SimModel] = []
    for model in models:
        if lacking <= 0:
            break
        chosen.append(model)
        lacking -= frees(model)
    if lacking > 0:
        return None
    for model in list(chosen):
        if lacking + frees(model) <= 0:
            chosen.remove(model)
            lacking += frees(model)
    return chosen
