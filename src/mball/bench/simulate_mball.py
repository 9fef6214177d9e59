"""MBALL in the simulator: the policy and the planner that the live scheduler runs, and its measured figures."""

from __future__ import annotations

from collections.abc import Sequence

from mball.bench.simulate_fleet import CONTEXT_BYTES, DEMOTE_S, DEVICE_BYTES
from mball.bench.simulate_world import SimModel, World
from mball.memory.allowance import Allowance
from mball.memory.look import Look, Standing
from mball.memory.planner import Candidate
from mball.memory.policy import decide, image_drops
from mball.memory.rates import Rate
from mball.memory.settings import Settings
from mball.memory.states import Process

_AHEAD_S = 1.0
"""While nobody waits, one look in so many seconds: images filled ahead of need can wait, and looking takes time."""


class Mball:
    name = "MBALL"

    def __init__(self, number: int, settings: Settings) -> None:
        self._settings = settings
        self._ahead_s = 0.0
        self._allowance = Allowance(settings.swap_time_share, settings.swap_saved_s, 0.0)
        self._rates = [Rate(settings.rate_window_s) for _ in range(number)]

    def arrived(self, model: SimModel, now: float) -> None:
        self._rates[model.number].count(now)

    def step(self, world: World, now: float) -> float:
        waiting = any(m.waiting and not m.on_device for m in world.models)
        gated = any(m.gated_since_s is not None for m in world.models)
        unread = not any(m.image == "filling" for m in world.models)
        if not (waiting or gated or (unread and now >= self._ahead_s)):
            return float("inf")
        self._ahead_s = now + _AHEAD_S
        by_name = {m.kind.name: m for m in world.models}
        look = Look(
            world.free_bytes,
            [self._standing(m, now) for m in world.models],
            busy=world.busy,
            starting=world.starting,
            dram_free_bytes=world.dram_free_bytes,
            saved_s=self._allowance.at(now),
        )
        decision = decide(look, self._settings)
        for start in decision.starts:
            world.start(by_name[start.model])
        for fill in decision.fills:
            world.fill(by_name[fill.model], [by_name[move.model] for move in fill.drops])
        if decision.bring is not None:
            bring = decision.bring
            demote = [by_name[move.model] for move in bring.moves if move.kind == "demote"]
            stop = [by_name[move.model] for move in bring.moves if move.kind == "stop"]
            model = by_name[bring.model]
            world.bring(model, demote=demote, stop=stop)
            if bring.verb == "promote":
                swap_s = model.promote_s + DEMOTE_S * len(demote)
                self._allowance.spend(swap_s * model.kind.needed_bytes / DEVICE_BYTES, now)
        for model in world.models:
            if model.kind.name in decision.gates and (model.gated_since_s is None or now - model.gated_since_s < 120.0):
                world.shut(model)
            elif model.gated_since_s is not None:
                world.reopen(model)
        return now + decision.again_s

    def images_for(self, world: World, model: SimModel, now: float) -> Sequence[SimModel] | None:
        kept = [m for m in world.models if m.image == "ready" and not m.moving]
        by_name = {m.kind.name: m for m in kept}
        drops = image_drops(
            self._candidate(model, now),
            model.kind.weights_bytes,
            [self._candidate(m, now) for m in kept],
            world.dram_free_bytes,
        )
        return None if drops is None else [by_name[move.model] for move in drops]

    def _standing(self, m: SimModel, now: float) -> Standing:
        return Standing(
            self._candidate(m, now),
            m.number,
            Process.STARTING if m.starting else Process.ALIVE if m.alive else Process.GONE,
            on_device=m.on_device,
            settled=not m.moving,
            arriving=m.arriving,
            is_open=m.is_open,
            queued=len(m.waiting),
            held_bytes=m.held_bytes,
            needed_bytes=m.kind.needed_bytes,
            context_bytes=CONTEXT_BYTES,
            gated_s=None if m.gated_since_s is None else now - m.gated_since_s,
            image_wanted_bytes=m.kind.weights_bytes if m.image == "none" else 0,
            filling=m.image == "filling",
        )

    def _candidate(self, m: SimModel, now: float) -> Candidate:
        kind = m.kind
        return Candidate(
            kind.name,
            demote_bytes=m.held_bytes - CONTEXT_BYTES if m.on_device else 0,
            stop_bytes=CONTEXT_BYTES if m.on_device else m.held_bytes,
            image_bytes=kind.weights_bytes if m.image == "ready" else 0,
            in_flight=m.inside,
            stay_s=now - m.opened_s,
            min_stay_s=self._settings.stay_s(m.promote_s + DEMOTE_S),
            rate=self._rates[m.number].at(now),
            queued=len(m.waiting),
            promote_s=m.promote_s,
            start_s=kind.start_s,
            source_s=kind.source_s,
            oldest_wait_s=now - m.waiting[0][0] if m.waiting else 0.0,
            gated=m.gated_since_s is not None,
        )
