"""What the manager knows of one model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mball.errors import MballError
from mball.memory.cores import Cores
from mball.memory.estimate import Estimate
from mball.memory.figures import Figures, Needs
from mball.memory.images import Image
from mball.memory.planner import Candidate
from mball.memory.process import Hello, WorkerProcess
from mball.memory.queue import Queue
from mball.memory.rates import Rate
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec, WorkerSpec
from mball.memory.states import Process, State, Weights
from mball.units import GiB


@dataclass
class Counters:
    starts: int = 0
    promotions: int = 0
    demotions: int = 0
    crashes: int = 0


class Model:
    """State, queue and figures of one model. `lock` is held by whoever moves it. Only the holder changes
    `state`, but for an image that becomes ready.

    `context_bytes`: device bytes of its idle worker. `estimate`: what its files say it needs, for the time before its
    first worker. `balloon_bytes`: what its operator wants it to do without, `ballooned_bytes`: what its engine does
    without now, `spare_bytes`: what the engine could give up now beside that, and nobody would notice, `layer_bytes`:
    and what of layers, after which a request would take `layer_s` longer. `tight_bytes`: what it has to do without when
    it comes, as those that never leave take the room. `cores`: where its worker may compute.
    `stored`: the swap store has its image, and reading it takes `stored_s`, as far as is known.
    `failure` makes the error that its requests get while it has failed. `wanted` without a request: a preload.
    `moving`: it is part of a transition that was decided, and nothing else is to be decided about it; `arriving`:
    that transition brings it in. `unload` is done once it is off the device. `configured` is its spec as the
    configuration has it; `farewell` is told when nothing of it is left, once it is configured no longer; its
    end is not tried before `leaves_at_s`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: Settings,
        number: int,
        changed: Callable[[], None],
        passed: Callable[[], None],
    ) -> None:
        """`changed` and `passed`: as its queue's."""
        self.spec = self.configured = spec
        self.number = number
        self.settings = settings
        self.pinned = spec.pinned
        self.queue = Queue(spec.name, spec.admitted, Rate(settings.rate_window_s), changed, passed)
        self.lock = asyncio.Lock()
        self.state = State()
        self.worker: WorkerProcess | None = None
        self.hello: Hello | None = None
        self.image: Image | None = None
        self.stored = False
        self.stored_s: float | None = None
        self.figures = Figures()
        self.counters = Counters()
        self.generation = 0
        self.context_bytes = 0
        self.measured_bytes = 0
        self.estimate: Estimate | None = None
        self.revision = ""
        self.balloon_bytes = 0
        self.ballooned_bytes = 0
        self.spare_bytes = 0
        self.layer_bytes = 0
        self.layer_s = 0.0
        self.tight_bytes = 0
        self.cores: Cores | None = None
        self.opened_s = 0.0
        self.gated_s: float | None = None
        self.not_before_s = 0.0
        self.crashes_in_row = 0
        self.error: str | None = None
        self.failure: Callable[[], MballError] | None = None
        self.wanted = spec.preload
        self.moving = False
        self.arriving = False
        self.unload: asyncio.Future[None] | None = None
        self.farewell: Callable[[Model], None] | None = None
        self.leaves_at_s = 0.0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def on_device(self) -> bool:
        return self.state == State(Process.ALIVE, Weights.DEVICE)

    @property
    def unused(self) -> bool:
        return not self.queue.in_flight and not len(self.queue)

    @property
    def retired(self) -> bool:
        """It is configured no longer: it answers those that came before, and leaves."""
        return self.farewell is not None

    @property
    def settled(self) -> bool:
        """Nobody moves it."""
        return not self.moving and not self.lock.locked()

    @property
    def rest(self) -> Weights:
        """Where the weights are when they are not on the device."""
        if self.image is not None and self.image.ready:
            return Weights.DRAM
        return Weights.NVME if self.stored else Weights.SOURCE

    @property
    def image_key(self) -> bytes | None:
        """Names its image by its content, as its worker said."""
        return None if self.hello is None else self.hello.image_key

    def name_image(self, key: bytes | None) -> None:
        """Where its worker could not say before what would be in it. None: not any more."""
        if self.hello is not None:
            self.hello = replace(self.hello, image_key=key)

    @property
    def needs(self) -> Needs | None:
        """What it takes of the device, by part: as its worker announced, else as it was when one last lived, else as
        its files say."""
        hello, known = self.hello, self.figures.needs
        if hello is not None:
            working = self._working_bytes(hello.weights_bytes, hello.working_bytes)
            return Needs(self.context_bytes, hello.weights_bytes, hello.kv_bytes, working)
        if known is not None or self.estimate is None:
            return known
        weights_bytes = self.estimate.weights_bytes
        return Needs(0, weights_bytes, self.estimate.kv_bytes, self._working_bytes(weights_bytes, None))

    def _working_bytes(self, weights_bytes: int, announced: int | None) -> int:
        working = self.spec.working_bytes if self.spec.working_bytes is not None else announced
        return max(self.settings.working_bytes, weights_bytes // 8) if working is None else working

    @property
    def needed_bytes(self) -> int:
        """Device bytes on the device, less what the balloon has: as announced, or as measured if that was more."""
        return self.needed_without(self.ballooned_bytes if self.on_device else self.arrives_without_bytes)

    def needed_without(self, ballooned_bytes: int) -> int:
        """The same with so much in the balloon."""
        needs = self.needs
        return max(0, max(needs.total_bytes if needs else 0, self.figures.held.value) - ballooned_bytes)

    @property
    def arrives_without_bytes(self) -> int:
        """What the balloon will have when it comes to the device."""
        return max(self.balloon_bytes, self.tight_bytes)

    @property
    def certain_bytes(self) -> int:
        """What it needs at the least: as `needed_bytes`, but of an estimate only what files and options say."""
        needs = self.needs
        if needs is None or self.known_from != "estimate":
            return self.needed_bytes
        return max(0, needs.weights_bytes + needs.kv_bytes - self.balloon_bytes)

    @property
    def starting_bytes(self) -> int:
        """Device bytes for a start, beside its context where that is not known yet."""
        return self.needed_bytes if self.spec.worker.starts_awake else self.context_bytes

    @property
    def movable_bytes(self) -> int:
        """What a demotion unmaps: its weights and the KV pool, less what the balloon has."""
        needs = self.needs
        return max(0, needs.weights_bytes + needs.kv_bytes - self.ballooned_bytes) if needs else 0

    @property
    def known_from(self) -> str:
        """Where `needed_bytes` comes from: measured, announced (by its worker), estimate (from its files), nothing."""
        if self.figures.held.value:
            return "measured"
        if self.hello is not None or self.figures.needs is not None:
            return "announced"
        return "nothing" if self.estimate is None else "estimate"

    @property
    def promote_s(self) -> float:
        """What bringing it back from where its weights rest takes; before it was measured, by a modest rate."""
        known = self.figures.promote_s[self.rest].value
        return known if known is not None else self.source_s

    @property
    def source_s(self) -> float:
        """The same where there is no image of it in DRAM."""
        if not self.stored:
            return self.load_s
        known = self.figures.promote_s[Weights.NVME].value
        known = self.stored_s if known is None else known
        return self.load_s if known is None else known

    @property
    def load_s(self) -> float:
        """The same where there is no image of it at all."""
        known = self.figures.promote_s[Weights.SOURCE].value
        return known if known is not None else self.needed_bytes / self.settings.first_rate

    def stream(self, worker: WorkerSpec) -> None:
        """From its next start on it is served as `worker` says, a part of it streamed: what was known is of no use."""
        layers, experts = worker.resident_layers, worker.resident_experts
        changed = replace(self.spec.worker, resident_layers=layers, resident_experts=experts)
        self.spec = replace(self.spec, worker=changed)
        self.hello, self.figures, self.estimate, self.revision = None, Figures(), None, ""

    def alter(self, spec: ModelSpec) -> None:
        """Takes what its worker need not know; what its operator pinned by hand stays where that was not altered."""
        before, self.configured = self.configured, spec
        self.spec = replace(
            self.spec,
            pinned=spec.pinned,
            priority=spec.priority,
            preload=spec.preload,
            keep_alive_s=spec.keep_alive_s,
            max_queue=spec.max_queue,
        )
        if spec.pinned != before.pinned:
            self.pinned = spec.pinned
        self.wanted = self.wanted or (spec.preload and not before.preload)

    def retire(self, farewell: Callable[[Model], None]) -> None:
        self.farewell = farewell
        self.wanted = self.pinned = False

    def become(self, other: Model) -> None:
        """Those that wait for it, which was never started, are served as the other would."""
        self.farewell = None
        self.spec, self.configured, self.pinned = other.spec, other.configured, other.pinned
        self.estimate, self.figures, self.revision = other.estimate, other.figures, other.revision
        self.queue.limit, self.wanted = other.spec.admitted, other.wanted

    def stay_s(self) -> float:
        """How long it stays on the device before it may go for another."""
        return self.settings.stay_s(self.promote_s + (self.figures.demote_s.value or 0.0))

    def keeps(self, measured_bytes: int) -> None:
        """Takes a measurement of what its worker holds."""
        self.measured_bytes = measured_bytes
        if self.on_device:
            whole = measured_bytes + self.ballooned_bytes
            self.figures.held.add(whole, time.monotonic(), used=self.queue.in_flight > 0)

    def doing(self, pid: int) -> str:
        """What its worker of that pid is at: start, a verb, drain, serve, awake or asleep."""
        worker = self.worker
        if worker is None or worker.pid != pid:
            return "start" if self.state.process is Process.STARTING else "stop"
        if self.state.process is Process.STOPPING:
            return "stop"
        if worker.doing is not None:
            return worker.doing
        if self.queue.in_flight:
            return "serve" if self.queue.is_open else "drain"
        return "awake" if self.on_device else "asleep"

    def candidate(self, held_bytes: int) -> Candidate:
        """It as the planner sees it; `held_bytes` are promised to it."""
        now = time.monotonic()
        gives = held_bytes - self.context_bytes if self.on_device else 0
        spare = max(0, min(self.spare_bytes, gives))
        return Candidate(
            self.name,
            demote_bytes=gives,
            stop_bytes=self.context_bytes if self.on_device else held_bytes,
            balloon_bytes=spare,
            layer_bytes=max(0, min(self.layer_bytes, gives - spare)),
            image_bytes=self.image.nbytes if self.image is not None and self.image.ready else 0,
            in_flight=self.queue.in_flight,
            pinned=self.pinned,
            priority=self.spec.priority,
            stay_s=now - self.opened_s,
            min_stay_s=self.stay_s(),
            rate=self.queue.rate.at(now),
            promote_s=self.promote_s,
            queued=len(self.queue),
            start_s=self.figures.start_s.value or 0.0,
            source_s=self.source_s,
            balloon_s=self.figures.balloon_s.value or 0.0,
            layer_s=self.layer_s,
            oldest_wait_s=self.queue.oldest_wait_s(now),
            gated=self.gated_s is not None,
        )

    def snapshot(self, promised_bytes: int) -> dict[str, Any]:
        """JSON for `/mball/v1/state`."""
        worker, figures = self.worker, self.figures
        rate = figures.load_rate
        return {
            "name": self.name,
            "task": self.spec.worker.task,
            "process": self.state.process.value,
            "weights": self.state.weights.value,
            "shown_as": self.state.shown_as,
            "open": self.queue.is_open,
            "pid": worker.pid if worker else None,
            "pinned": self.pinned,
            "in_flight": self.queue.in_flight,
            "queued": len(self.queue),
            "device_bytes": self.measured_bytes,
            "promised_bytes": promised_bytes,
            "needed_bytes": self.needed_bytes,
            "known_from": self.known_from,
            "balloon_bytes": self.balloon_bytes,
            "ballooned_bytes": self.ballooned_bytes,
            "spare_bytes": self.spare_bytes if self.on_device else 0,
            "layer_bytes": self.layer_bytes if self.on_device else 0,
            "cores": self.cores.as_dict() if self.cores else None,
            "weights_bytes": self.hello.weights_bytes if self.hello else None,
            "loaded_bytes": worker.loaded_bytes if worker else 0,
            "baseline_bytes": self.hello.baseline_bytes if self.hello else None,
            "image_bytes": self.image.nbytes if self.image else 0,
            "image_ready": self.image is not None and self.image.ready,
            "stored": self.stored,
            "starts": self.counters.starts,
            "promotions": self.counters.promotions,
            "demotions": self.counters.demotions,
            "crashes": self.counters.crashes,
            "rate": self.queue.rate.at(time.monotonic()),
            "promote_s": self.promote_s,
            "last_swap_s": figures.last_swap_s,
            "load_gib_s": rate / GiB if rate else None,
            "error": self.error,
            "retired": self.retired,
        }
