"""What happens next on a device. Pure: the live scheduler and the simulator ask the same `decide`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from mball.memory.look import Bring, Decision, Fill, Look, Standing
from mball.memory.planner import SERVES_ON, Candidate, Demand, Move, Snapshot, may_leave, next_change_s, plan
from mball.memory.settings import Settings
from mball.memory.states import Process
from mball.units import format_bytes

ADVANTAGE = 2.0
"""By how much an image must be worth more than those that go for it: filling costs too, and figures waver."""

_TRIED = 3
"""So many images are weighed against those that are kept: the rest would hardly win."""


def decide(look: Look, settings: Settings) -> Decision:
    """Whom to serve next, whose door to shut for it, what to move, and which image to fill meanwhile."""
    return _Round(look, settings).decide()


def turn(standing: Standing, settings: Settings) -> tuple[bool, float, float, int]:
    """The least is served first: whoever is overdue, the oldest of them; then by priority; then by age."""
    c = standing.candidate
    overdue = c.oldest_wait_s >= settings.max_wait_s
    return not overdue, 0.0 if overdue else -c.priority, -c.oldest_wait_s, standing.number


def image_drops(
    wanting: Candidate, nbytes: int, kept: Iterable[Candidate], dram_free_bytes: int
) -> tuple[Move, ...] | None:
    """Whose images go for one of `nbytes`: () where there is room, None where those that stay are worth more.

    An image is worth the seconds that it saves: arrival rate × what loading from the source takes longer. One whose
    requests wait is worth any other.
    """
    images = tuple(replace(c, pinned=False, promote_s=0.0) for c in kept if c.image_bytes > 0)
    drops = plan(Snapshot(0, images, dram_free_bytes), Demand(wanting.name, 0, dram_bytes=nbytes))
    gain = (wanting.rate + wanting.queued) * wanting.source_s
    if drops is None or ADVANTAGE * sum(move.cost for move in drops) > gain:
        return None
    return tuple(drops)


class _Round:
    """One look at everything: what is decided for one model is taken into account for the next."""

    def __init__(self, look: Look, settings: Settings) -> None:
        self._standings = look.standings
        self._settings = settings
        self._busy = look.busy
        self._starting = look.starting
        self._dram_free_bytes = look.dram_free_bytes
        coming_bytes = sum(s.lacking_bytes for s in look.standings if s.arriving)
        self._free_bytes = look.free_bytes - look.excess_bytes - coming_bytes
        self._excess_bytes = look.excess_bytes
        self._elsewhere = look.elsewhere
        self._reading = look.reading
        self._saved_s = look.saved_s
        self._taken: set[str] = set()
        self._again: list[float] = []
        self._out = Decision(0.0)

    def decide(self) -> Decision:
        self._send_away()
        if self._busy:
            self._out.gates |= {s.name for s in self._standings if s.gated_s is not None} - self._taken
        self._taken |= self._out.gates
        wanting = [s for s in self._standings if (s.queued or s.wanted) and not (s.is_open or s.on_device)]
        for standing in sorted(wanting, key=lambda s: turn(s, self._settings)):
            self._serve(standing)
        if not any(s.queued for s in wanting):
            self._fill_ahead()
        self._again += [
            self._settings.drain_s - (s.gated_s or 0.0) for s in self._standings if s.name in self._out.gates
        ]
        self._out.again_s = max(0.0, min(self._again, default=float("inf")))
        return self._out

    def _send_away(self) -> None:
        """What is to leave for its own sake, or because others took what was promised."""
        if self._excess_bytes > 0:
            self._yield(self._excess_bytes)
        for s in self._standings:
            if not s.settled or s.name in self._taken:
                continue
            reason = None
            if s.unload:
                reason = "unloaded on request"
                if not s.on_device:
                    self._out.gone.append(s.name)
                    continue
            elif s.on_device and s.over_bytes > 0:
                reason = self._relieve(s)
            elif s.on_device and s.idle_left_s is not None and not (s.candidate.pinned or s.queued):
                self._again += [s.idle_left_s] if s.idle_left_s > 0 else []
                reason = "not used for its keep_alive_s" if s.idle_left_s <= 0 else None
            if reason is None:
                continue
            if s.candidate.in_flight:
                self._out.gates.add(s.name)
            elif not self._busy:
                self._send([Move("demote", s.name, s.candidate.demote_bytes, reason)])

    def _yield(self, nbytes: int) -> None:
        """Idle ones go first, then busy ones are drained; where even that is too little, all that can goes."""
        snapshot, demand = replace(self._snapshot(), free_bytes=0), Demand("", nbytes, float("inf"), 0.0)
        able = [c for c in snapshot.candidates if not c.pinned and (c.demote_bytes <= 0 or may_leave(c, demand))]
        most = sum(c.demote_bytes + c.stop_bytes for c in able)
        moves = plan(snapshot, replace(demand, nbytes=min(nbytes, most))) or []
        change = next_change_s(snapshot, demand)
        self._again += [] if change is None or most >= nbytes else [change]
        drained = [move for move in moves if move.kind == "drain"]
        self._out.gates |= {move.model for move in drained}
        self._taken |= {move.model for move in drained}
        why = f"{format_bytes(nbytes)} of what was promised are held by others"
        if not self._busy and (leaving := [move for move in moves if move.kind != "drain"]):
            self._send([replace(move, reason=f"{why}: {move.reason}") for move in leaving])

    def _relieve(self, s: Standing) -> str | None:
        """It holds more than it was promised: promise it, make room for it, or else it has to leave."""
        moves = plan(self._snapshot(), Demand(s.name, s.over_bytes, float("inf"), 0.0))
        why = f"{s.name} holds {format_bytes(s.over_bytes)} more than it was promised"
        if moves == []:
            self._free_bytes -= s.over_bytes
            self._out.grow.append(s.name)
            return None
        if moves is None or any(move.kind in ("drain", *SERVES_ON) for move in moves):
            return f"{why}, and nothing idle can make room"
        if not self._busy:
            self._send([replace(move, reason=f"{why}: {move.reason}") for move in moves])
        return None

    def _send(self, leaving: list[Move]) -> None:
        self._out.send = leaving
        self._busy = True
        self._taken |= {move.model for move in leaving}

    def _serve(self, s: Standing) -> None:
        """Begins to bring one in whose requests wait, or keeps what it will need."""
        if s.ready_in_s > 0:
            self._again.append(s.ready_in_s)
            return
        verb = self._verb(s)
        if verb is None or s.filling:
            return
        if verb == "promote" and self._busy:
            self._fetch(s)
            return
        if verb == "promote" and self._fill_first(s):
            return
        c = s.candidate
        demand = Demand(s.name, s.lacking_bytes, c.oldest_wait_s, self._settings.max_wait_s, priority=c.priority)
        snapshot = self._snapshot()
        moves = plan(snapshot, demand)
        if moves != [] and not s.queued:
            self._out.forget.append(s.name)  # preloading takes no other's place
        elif moves is None:
            self._out.crowded.append(s.name)
            change = next_change_s(snapshot, demand)
            self._again += [] if change is None else [change]
            self._again += [-self._saved_s / self._settings.swap_time_share] if self._saved_s < 0 else []
            self._keep(demand, sum(c.demote_bytes + c.stop_bytes for c in snapshot.candidates if not c.pinned))
            self._fetch(s)
        elif any(move.kind == "drain" for move in moves):
            # The idle ones too: whoever entered one of them would have to be waited for next.
            self._out.gates |= {move.model for move in moves if move.kind not in SERVES_ON}
            self._taken |= {move.model for move in moves}
            self._keep(demand, sum(move.frees_bytes for move in moves))
            self._fetch(s)
        else:
            self._begin(Bring(s.name, verb, demand.nbytes, tuple(moves)))

    def _verb(self, s: Standing) -> Literal["start", "promote"] | None:
        if not s.settled or s.ready_in_s > 0 or s.name in self._taken:
            return None
        if s.process is Process.ALIVE:
            return "promote"
        return "start" if s.process is Process.GONE and self._starting < self._settings.max_starts else None

    def _begin(self, bring: Bring) -> None:
        """A start that needs no move needs no transition either."""
        if bring.verb == "start" and not bring.moves:
            self._out.starts.append(bring)
            self._starting += 1
        elif self._busy:
            return
        else:
            self._out.bring = bring
            self._busy = True
            self._taken |= {move.model for move in bring.moves}
        self._taken.add(bring.model)
        self._free_bytes -= max(0, bring.nbytes - sum(move.frees_bytes for move in bring.moves))

    def _keep(self, demand: Demand, freed_bytes: int) -> None:
        """What is free and will be needed for it is no other's."""
        self._free_bytes -= max(0, demand.nbytes - freed_bytes)

    def _fill_first(self, s: Standing) -> bool:
        """A long load from the source would keep all others from switching: its image is filled first, beside them.

        One after another, the oldest first: together they would take as long, and hold what others could use.
        """
        c = s.candidate
        if not s.image_wanted_bytes or c.image_bytes or c.promote_s <= self._settings.hold_s:
            return False
        reading = bool(self._out.fills) or any(other.filling and other.queued for other in self._standings)
        return self._reading or reading or self._fill(s)

    def _fetch(self, s: Standing) -> None:
        """While it waits for its turn, what rests in the swap store comes to DRAM, where there is room and the disk has
        nothing else to do."""
        if not (s.stored and s.queued and 0 < s.image_wanted_bytes <= self._dram_free_bytes):
            return
        loading = any(other.arriving and not other.candidate.image_bytes for other in self._standings)
        filling = bool(self._out.fills) or any(other.filling for other in self._standings)
        if s.process is Process.ALIVE and s.settled and not (self._reading or loading or filling):
            self._fill(s)

    def _fill_ahead(self) -> None:
        """Nobody waits, and nothing is read: the image that would save most, where those that go save far less."""
        if self._reading or self._out.fills or any(s.filling for s in self._standings):
            return
        lacking = [s for s in self._standings if s.image_wanted_bytes and s.process is Process.ALIVE and s.settled]
        hopeful = [s for s in lacking if s.candidate.rate > 0 and s.name not in self._taken]
        for s in sorted(hopeful, key=lambda s: (-s.candidate.rate * s.candidate.source_s, s.number))[:_TRIED]:
            if self._fill(s):
                return

    def _fill(self, s: Standing) -> bool:
        drops = image_drops(s.candidate, s.image_wanted_bytes, self._images(), self._dram_free_bytes)
        if drops is None:
            return False
        self._out.fills.append(Fill(s.name, drops))
        self._dram_free_bytes -= s.image_wanted_bytes - sum(move.frees_bytes for move in drops)
        self._taken |= {s.name, *(move.model for move in drops)}
        return True

    def _images(self) -> list[Candidate]:
        here = [s.candidate for s in self._standings if s.settled and not s.filling]
        return [c for c in (*here, *self._elsewhere) if c.name not in self._taken]

    def _snapshot(self) -> Snapshot:
        movable = (
            self._candidate(s)
            for s in self._standings
            if s.process is Process.ALIVE
            and s.settled
            and s.name not in self._taken
            and not s.unload
            and (s.on_device or not s.filling)
        )
        return Snapshot(self._free_bytes, tuple(movable))

    def _candidate(self, s: Standing) -> Candidate:
        """A stay is there to serve in: while switching is rare, one that serves nobody ends for those that wait."""
        c = s.candidate
        idle = s.on_device and not (c.in_flight or c.queued)
        return replace(c, min_stay_s=0.0) if idle and self._saved_s > 0 else c
