"""Whose memory is taken for whom. Pure: everything it needs to know, the time too, is in the snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mball.units import format_bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model whose worker lives.

    `demote_bytes` come free by demoting it (0: it is not on the device), `stop_bytes` more by stopping its worker.
    `stay_s` is how long it has been on the device, `min_stay_s` how long it may at least stay. `rate` is in requests
    a second; `oldest_wait_s` is the age of the oldest request that waits for it. `gated`: an earlier plan shut its
    door already.
    """

    name: str
    demote_bytes: int = 0
    stop_bytes: int = 0
    in_flight: int = 0
    pinned: bool = False
    stay_s: float = 0.0
    min_stay_s: float = 0.0
    rate: float = 0.0
    promote_s: float = 0.0
    start_s: float = 0.0
    oldest_wait_s: float = 0.0
    gated: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A device at one moment. Models that can't be moved now, such as one that is starting, are not among them."""

    free_bytes: int
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Demand:
    """`nbytes` are wanted for `model`, whose oldest request has waited `wait_s`; at `max_wait_s` it is overdue."""

    model: str
    nbytes: int
    wait_s: float = 0.0
    max_wait_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Move:
    """`drain`: let no new request in, and demote once the last one has ended. `stop` frees what `demote` does too."""

    kind: Literal["demote", "drain", "stop"]
    model: str
    frees_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Item:
    """One thing that may be given up: a stay on the device, or a worker that sleeps or was demoted by `after`."""

    candidate: Candidate
    stop: bool
    nbytes: int
    cost: float

    @property
    def rank(self) -> tuple[bool, float, str]:
        """The first goes first. A plan made anew keeps to the doors that the last one shut."""
        return not self.candidate.gated, self.cost / self.nbytes, self.candidate.name


def plan(snapshot: Snapshot, demand: Demand) -> list[Move] | None:
    """The cheapest moves found that free what the demand lacks; [] where nothing is lacking, None where none do.

    Cost is what coming back would take: arrival rate × seconds; gated ones go first, then the lowest cost a byte, and
    what turns out not to be needed stays. Idle models are taken before busy ones. Never a pinned model, the one that
    demands, or one inside its minimum stay, unless the demand is overdue and the oldest (and a busy one has had as
    long as its swap took).
    """
    lacking = demand.nbytes - snapshot.free_bytes
    if lacking <= 0:
        return []
    movable = [c for c in snapshot.candidates if not c.pinned and c.name != demand.model]
    stays = [c for c in movable if c.demote_bytes > 0 and _may_end(c, demand)]
    asleep = [c for c in movable if c.demote_bytes <= 0 and c.stop_bytes > 0]
    idle = [c for c in stays if c.in_flight == 0]
    for victims in (idle, stays):
        first = [_stay(c) for c in victims] + [_worker(c) for c in asleep]
        further = [_worker(c) for c in victims if c.stop_bytes > 0]
        chosen = _cheapest(first, lacking) or _cheapest(first, lacking, further)
        if chosen:
            return _as_moves(chosen)
    return None


def next_change_s(snapshot: Snapshot, demand: Demand) -> float | None:
    """In how many seconds time alone lets `plan` find more; None where it never will."""
    staying = [c for c in snapshot.candidates if not c.pinned and c.demote_bytes > 0]
    changes = [c.min_stay_s - c.stay_s for c in staying] + [c.promote_s - c.stay_s for c in staying]
    changes.append(demand.max_wait_s - demand.wait_s)
    ahead = [change for change in changes if 0 < change < float("inf")]
    return min(ahead) if ahead else None


def _may_end(candidate: Candidate, demand: Demand) -> bool:
    overdue = demand.wait_s >= demand.max_wait_s and demand.wait_s >= candidate.oldest_wait_s
    # Under overload every demand is overdue: a stay no longer than the swap would move models and serve nobody.
    earned = candidate.in_flight == 0 or candidate.stay_s >= candidate.promote_s
    return (overdue and earned) or candidate.stay_s >= candidate.min_stay_s


def _stay(c: Candidate) -> _Item:
    return _Item(c, False, c.demote_bytes, c.rate * c.promote_s)


def _worker(c: Candidate) -> _Item:
    return _Item(c, True, c.stop_bytes, c.rate * c.start_s)


def _cheapest(items: list[_Item], lacking: int, further: Iterable[_Item] = ()) -> list[_Item]:
    """By rising score until enough is free; `further` items, workers of models among `items`, come after all these."""
    chosen: list[_Item] = []
    for item in [*sorted(items, key=lambda i: i.rank), *sorted(further, key=lambda i: i.rank)]:
        if _freed(chosen) >= lacking:
            break
        chosen.append(item)
    if _freed(chosen) < lacking:
        return []
    # The dearest first: what the others make up for is kept.
    for item in sorted(chosen, key=lambda i: (not i.candidate.gated, i.cost, i.rank, i.stop), reverse=True):
        without = [other for other in chosen if not _goes_with(other, item)]
        if _freed(without) >= lacking:
            chosen = without
    return chosen


def _goes_with(other: _Item, item: _Item) -> bool:
    """A demoted model's worker can't be stopped while its weights stay."""
    return other == item or (not item.stop and other.candidate is item.candidate)


def _freed(items: Iterable[_Item]) -> int:
    return sum(item.nbytes for item in items)


def _as_moves(chosen: list[_Item]) -> list[Move]:
    moves = []
    for name in dict.fromkeys(item.candidate.name for item in chosen):
        items = [item for item in chosen if item.candidate.name == name]
        c, nbytes = items[0].candidate, _freed(items)
        stays = any(not item.stop for item in items)
        kind: Literal["demote", "drain", "stop"] = "demote"
        if stays and c.in_flight > 0:
            kind = "drain"
        elif any(item.stop for item in items):
            kind = "stop"
        seconds = c.promote_s if stays else c.start_s
        reason = f"{c.rate:.3g} req/s × {seconds:.2f} s ÷ {format_bytes(nbytes)} is the lowest"
        moves.append(Move(kind, name, nbytes, reason))
    return moves
