"""Several devices, and which model belongs to which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from mball.device.device import members
from mball.errors import ConfigError
from mball.memory.events import Events
from mball.memory.model import Model
from mball.memory.placement import place
from mball.memory.planner import Candidate, Demand, Snapshot, next_change_s
from mball.memory.settings import Settings
from mball.memory.slot import Slot
from mball.memory.states import Process
from mball.units import format_bytes

_ADVANTAGE = 2.0
"""By how much another device must be better for a model that has one already: figures waver."""

_WEIGH_S = 0.2
"""Those that wait long are weighed no oftener: each time is a plan on every device."""


class Devices:
    """A model belongs to one device at any time. Its process stays where it began; a model that has none is given a
    device when it is wanted: where its coming costs the others least, the models that are on their way reckoned with.
    """

    def __init__(self, models: Mapping[str, Model], settings: Settings, events: Events) -> None:
        self._models = models
        self._settings = settings
        self._events = events
        self._slots: list[Slot] = []
        self._placed: set[str] = set()
        self._weighed_s = float("-inf")

    @property
    def models(self) -> Iterable[Model]:
        return self._models.values()

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def settle(self, slots: list[Slot]) -> None:
        """These are the devices from now on. Raises ConfigError for two of one name, or a model that has none."""
        self._slots = slots
        names = [slot.name for slot in slots]
        parts = [part for name in names for part in members(name)]
        if len(set(parts)) != len(parts) or not names:
            raise ConfigError(f"the devices are {', '.join(names) or 'none'}: name each once")
        for model in self._models.values():
            self.check(model)
            self.seat(model)

    def check(self, model: Model) -> None:
        """Raises ConfigError where it has no device here."""
        if self.allowed(model):
            return
        names, ranks = ", ".join(slot.name for slot in self._slots), model.spec.worker.ranks
        if not any(_spreads(model, slot) for slot in self._slots):
            wanted = f"its engine takes {ranks} GPUs" if ranks > 1 else "its engine takes one GPU"
            ways = (
                "name so many as one (device: cuda:0+cuda:1)"
                if ranks > 1
                else "use engine: vllm with tensor_parallel_size"
            )
            raise ConfigError(f"{model.name}: {wanted}, and the devices here are {names}: {ways}")
        raise ConfigError(f"{model.name}: its device is {', '.join(model.spec.devices)}, and those here are {names}")

    def seat(self, model: Model) -> None:
        self.allowed(model)[0].models[model.name] = model

    def unseat(self, model: Model) -> None:
        del self.of(model).models[model.name]
        self._placed.discard(model.name)

    def of(self, model: Model) -> Slot:
        return next(slot for slot in self._slots if model.name in slot.models)

    def allowed(self, model: Model) -> list[Slot]:
        devices = model.spec.devices
        return [slot for slot in self._slots if (not devices or slot.name in devices) and _spreads(model, slot)]

    def most_bytes(self, model: Model) -> int:
        """The largest budget that it can have."""
        return max(slot.ledger.total_bytes for slot in self.allowed(model))

    def roomier(self, model: Model, slot: Slot) -> bool:
        """Whether another device could give it more, once all has left that may."""
        most_bytes = _unpinned_bytes(slot, model)
        return any(_unpinned_bytes(other, model) > most_bytes for other in self.allowed(model) if other is not slot)

    def elsewhere(self, slot: Slot) -> list[Candidate]:
        """The models of other devices: host memory for images is one for all."""
        others = (m for other in self._slots if other is not slot for m in other.models.values())
        return [m.candidate(0) for m in others if m.settled and m.image is not None and m.image.ready]

    def reading(self, slot: Slot) -> bool:
        """Whether an image is filled for another device: the disk is one for all."""
        return any(other.scheduler.filling for other in self._slots if other is not slot)

    def wake(self) -> None:
        for slot in self._slots:
            slot.scheduler.wake()

    def passed(self) -> None:
        for slot in self._slots:
            slot.scheduler.passed()

    def gather(self, now: float) -> float:
        """Gives those that wait for a start their devices, the oldest first; those that have one are weighed anew now
        and then. Returns in how many seconds to call again, if nothing changes before."""
        if len(self._slots) == 1:
            return float("inf")
        waiting = [m for m in self._models.values() if self._waits(m, now)]
        self._placed &= {m.name for m in waiting}
        if not waiting:
            return float("inf")
        if weigh := now - self._weighed_s >= _WEIGH_S:
            self._weighed_s = now
        for model in sorted(waiting, key=lambda m: (-m.queue.oldest_wait_s(now), m.number)):
            if model.name in self._placed and not weigh:
                continue
            home, best = self.of(model), self._best(model)
            fresh = model.name not in self._placed
            self._placed.add(model.name)
            if best is not home:
                del home.models[model.name]
                best.models[model.name] = model
                best.scheduler.wake()
            if fresh or best is not home:
                room = format_bytes(best.ledger.free_bytes)
                self._events.record("placed", model.name, f"on {best.name}, where {room} are free", device=best.name)
        return max(0.0, self._weighed_s + _WEIGH_S - now)

    def better(self, model: Model) -> Slot | None:
        """Where there is room, and a start would serve a model sooner or at less cost to others than waking its worker
        where it sleeps; None where that is not so. A request that waits counts as one a second, as with the planner."""
        start_s, home, needed = model.figures.start_s.value, self.of(model), model.needed_bytes
        others = [slot for slot in self.allowed(model) if slot is not home and slot.lost is None]
        roomy = [slot for slot in others if self._room(slot, model).free_bytes >= needed]
        if start_s is None or not roomy:
            return None
        c, here = model.candidate(0), self._room(home, model)
        lacking_bytes = needed - home.ledger.held(model.name)
        demand = Demand(model.name, lacking_bytes, c.oldest_wait_s, self._settings.max_wait_s, priority=c.priority)
        stays = place([here], demand)
        if stays is None:
            wait_s = next_change_s(here, demand)
            sooner = wait_s is None or wait_s > start_s
        else:
            sooner = stays.cost > (c.rate + c.queued) * start_s
        return min(roomy, key=lambda slot: self._room(slot, model).free_bytes) if sooner else None

    def _waits(self, model: Model, now: float) -> bool:
        """For a start that has not begun."""
        return (
            (len(model.queue) > 0 or model.wanted)
            and model.state.process is Process.GONE
            and model.worker is None
            and model.settled
            and model.unload is None
            and model.not_before_s <= now
        )

    def _best(self, model: Model) -> Slot:
        allowed = [slot for slot in self.allowed(model) if slot.lost is None] or self.allowed(model)
        fitting = [slot for slot in allowed if model.certain_bytes <= slot.ledger.limit_bytes]
        if not fitting:
            return max(allowed, key=lambda slot: slot.ledger.limit_bytes)
        home = self.of(model)
        stays = home if home in fitting and model.name in self._placed else None
        room = {slot.name: self._room(slot, model) for slot in fitting}
        roomiest = max(fitting, key=lambda slot: room[slot.name].free_bytes)
        if not model.needed_bytes:  # nothing is known of it yet
            return stays or roomiest
        c = model.candidate(0)
        nbytes = model.needed_bytes + (0 if model.context_bytes else home.device.context_bytes)
        demand = Demand(model.name, nbytes, c.oldest_wait_s, self._settings.max_wait_s, priority=c.priority)
        found = place(list(room.values()), demand)
        if found is None:
            return stays or roomiest
        there = place([room[stays.name]], demand) if stays is not None else None
        if stays is not None and there is not None and there.cost <= _ADVANTAGE * found.cost:
            return stays
        return fitting[found.devices[0]]

    def _room(self, slot: Slot, model: Model) -> Snapshot:
        """A device as it will be once those have come that are to come there."""
        others = [m for m in slot.models.values() if m is not model]
        coming = [m for m in others if not m.on_device and self._comes(m)]
        free_bytes = slot.ledger.limit_bytes - slot.ledger.promised_bytes
        least = slot.device.context_bytes
        free_bytes -= sum(max(0, max(m.needed_bytes, least) - slot.ledger.held(m.name)) for m in coming)
        movable = [m for m in others if m.state.process is Process.ALIVE and m.settled and m not in coming]
        return Snapshot(free_bytes, tuple(m.candidate(slot.ledger.held(m.name)) for m in movable))

    def _comes(self, model: Model) -> bool:
        wanted = len(model.queue) > 0 or model.wanted or model.arriving
        return wanted and (model.name in self._placed or model.state.process is not Process.GONE)


def _spreads(model: Model, slot: Slot) -> bool:
    """Whether its engine has a process for each GPU of a device, and none more. All of them may share a CPU."""
    return slot.name == "cpu" or model.spec.worker.ranks == len(members(slot.name))


def _unpinned_bytes(slot: Slot, model: Model) -> int:
    pinned = [m for m in slot.models.values() if m.pinned and m is not model]
    return slot.ledger.total_bytes - sum(slot.ledger.held(m.name) for m in pinned)
