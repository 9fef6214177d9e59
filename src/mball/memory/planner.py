"""Whose memory is taken for whom. Pure: everything it needs to know, the time too, is in the snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mball.memory.cover import Offer, cover
from mball.units import format_bytes

Kind = Literal["balloon", "layers", "demote", "drain", "stop", "drop"]

SERVES_ON: tuple[Kind, ...] = ("balloon", "layers")
"""Moves of a model that go on serving while they are made."""

_RARE = 1 / 86_400
"""A model that nobody asked for lately is thought to be asked for once a day: coming back is never free."""

_UNDER_WAY = 1e-3
"""What a model whose door is shut already counts for: a plan made anew keeps to what the last one began."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model whose worker lives, or whose image is kept.

    `demote_bytes` come free by demoting it (0: it is not on the device), `stop_bytes` more by stopping its worker.
    Of `demote_bytes` its engine can give up `balloon_bytes` while it serves and nobody notices, and `layer_bytes` more,
    after which a request takes `layer_s` longer. `image_bytes` are held in DRAM. Coming back takes `promote_s` from
    where its weights rest, `start_s` more after a stop, `source_s` in place of `promote_s` without the image,
    `balloon_s` for what the balloon took. `stay_s` is how long it has been on the device, `min_stay_s` how long it may
    at least stay. `rate` is in requests a second; `queued` requests wait for it now, the oldest for `oldest_wait_s`.
    The higher `priority` goes first. `gated`: an earlier plan shut its door already.
    """

    name: str
    demote_bytes: int = 0
    stop_bytes: int = 0
    balloon_bytes: int = 0
    image_bytes: int = 0
    in_flight: int = 0
    pinned: bool = False
    priority: int = 0
    stay_s: float = 0.0
    min_stay_s: float = 0.0
    rate: float = 0.0
    queued: int = 0
    promote_s: float = 0.0
    start_s: float = 0.0
    source_s: float = 0.0
    balloon_s: float = 0.0
    oldest_wait_s: float = 0.0
    gated: bool = False
    layer_bytes: int = 0
    layer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A device, and the DRAM for images, at one moment. What is reserved for moves under way is not free, and models
    that can't be moved now, such as one that is starting, are not among the candidates."""

    free_bytes: int
    candidates: tuple[Candidate, ...] = ()
    dram_free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """`nbytes` of the device and `dram_bytes` for an image are wanted for `model`, whose oldest request has waited
    `wait_s`; at `max_wait_s` it is overdue."""

    model: str
    nbytes: int
    wait_s: float = 0.0
    max_wait_s: float = float("inf")
    dram_bytes: int = 0
    priority: int = 0

    @property
    def overdue(self) -> bool:
        return self.wait_s >= self.max_wait_s


@dataclass(frozen=True, slots=True)
class Move:
    """`balloon`: the engine gives up part of its memory and serves on, `layers`: and streams more of its weights from
    then on. `drain`: let no new request in, and demote once the last one has ended. `stop` frees what `demote` does
    too. `drop` frees an image. `cost` is in seconds of waiting a second: arrival rate × what coming back takes, or what
    a request takes longer."""

    kind: Kind
    model: str
    frees_bytes: int
    reason: str
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class _What:
    """An offer in the planner's words: it costs `rate` × `seconds`."""

    kind: Kind
    candidate: Candidate
    seconds: float


def plan(snapshot: Snapshot, demand: Demand) -> list[Move] | None:
    """The cheapest moves found that free what the demand lacks; [] where nothing is lacking, None where none do.

    Cost is what coming back would take: arrival rate × seconds. Balloons are asked first, then idle models, then busy
    ones, which are drained; among these the cheapest together. Layers of models that may be streamed, idle or busy, are
    weighed against idle models: while they are away every request takes longer. Never a pinned model, the one that
    demands, or one that `may_leave` protects.
    """
    lacking, dram_lacking = demand.nbytes - snapshot.free_bytes, demand.dram_bytes - snapshot.dram_free_bytes
    if lacking <= 0 and dram_lacking <= 0:
        return []
    movable = sorted((c for c in snapshot.candidates if _movable(c, demand)), key=lambda c: c.name)
    moves = _device_moves(movable, demand, lacking)
    drops = _moves([[_drop(c)] for c in movable if c.image_bytes > 0], dram_lacking)
    return None if moves is None or drops is None else moves + drops


def next_change_s(snapshot: Snapshot, demand: Demand) -> float | None:
    """In how many seconds time alone lets `plan` find more; None where it never will."""
    staying = [c for c in snapshot.candidates if not c.pinned and c.demote_bytes > 0]
    changes = [c.min_stay_s - c.stay_s for c in staying] + [c.promote_s - c.stay_s for c in staying]
    changes.append(demand.max_wait_s - demand.wait_s)
    ahead = [change for change in changes if 0 < change < float("inf")]
    return min(ahead) if ahead else None


def may_leave(candidate: Candidate, demand: Demand) -> bool:
    """Whether a model on the device has been there long enough to leave it for this demand.

    Its minimum stay protects it, and a higher priority does, unless the demand is overdue and the oldest. What is under
    way is not reversed by a change of the demand.
    """
    if candidate.gated:
        return True
    # Under overload every demand is overdue: a stay no longer than the swap would move models and serve nobody.
    earned = candidate.in_flight == 0 or candidate.stay_s >= candidate.promote_s
    if demand.overdue and demand.wait_s >= candidate.oldest_wait_s and earned:
        return True
    return candidate.stay_s >= candidate.min_stay_s and candidate.priority <= demand.priority


def _movable(candidate: Candidate, demand: Demand) -> bool:
    return not candidate.pinned and candidate.name != demand.model


def _device_moves(movable: Sequence[Candidate], demand: Demand, lacking: int) -> list[Move] | None:
    balloons = [[_balloon(c)] for c in movable if c.balloon_bytes > 0]
    if (moves := _moves(balloons, lacking)) is not None:
        return moves
    leaving = {c.name for c in movable if c.demote_bytes <= 0 or may_leave(c, demand)}
    for kept in ([c.name for c in movable if _busy(c)], []):
        groups = [
            [*_offers(c, c.name in leaving and c.name not in kept), *_layers(c, demand, lacking)] for c in movable
        ]
        if (moves := _moves(groups, lacking)) is not None:
            return moves
    return None


def _offers(c: Candidate, leaves: bool) -> Iterable[Offer[_What]]:
    if c.balloon_bytes > 0:
        yield _balloon(c)
    if not leaves:
        return
    if c.demote_bytes > 0:
        yield _offer("drain" if _busy(c) else "demote", c, c.demote_bytes, c.promote_s)
    if c.stop_bytes > 0:
        asleep = c.demote_bytes <= 0
        seconds = c.start_s if asleep else c.promote_s + c.start_s
        yield _offer("drain" if _busy(c) else "stop", c, c.demote_bytes + c.stop_bytes, seconds)


def _layers(c: Candidate, demand: Demand, lacking: int) -> Iterable[Offer[_What]]:
    """All that it has, or as much as is lacking; nothing nobody misses is left then. Not for one of lower priority."""
    if c.layer_bytes <= 0 or c.gated or c.priority > demand.priority:
        return
    for nbytes in {lacking, c.balloon_bytes + c.layer_bytes}:
        if c.balloon_bytes < nbytes <= c.balloon_bytes + c.layer_bytes:
            share = (nbytes - c.balloon_bytes) / c.layer_bytes
            yield _offer("layers", c, nbytes, c.balloon_s + share * c.layer_s)


def _busy(c: Candidate) -> bool:
    return c.in_flight > 0 and c.demote_bytes > 0


def _balloon(c: Candidate) -> Offer[_What]:
    return _offer("balloon", c, c.balloon_bytes, c.balloon_s)


def _drop(c: Candidate) -> Offer[_What]:
    return _offer("drop", c, c.image_bytes, max(0.0, c.source_s - c.promote_s))


def _offer(kind: Kind, c: Candidate, nbytes: int, seconds: float) -> Offer[_What]:
    # Those that wait come within the second. A move takes at least a moment: of two that free enough, none is better.
    cost = max(c.rate + c.queued, _RARE) * max(seconds, 1e-3) * (_UNDER_WAY if c.gated and kind != "drop" else 1.0)
    return Offer(nbytes, cost, _What(kind, c, seconds))


def _moves(groups: Sequence[Sequence[Offer[_What]]], lacking: int) -> list[Move] | None:
    chosen = cover(groups, lacking)
    if chosen is None:
        return None
    lowest = min((offer.score for group in groups for offer in group), default=0.0)
    return [_move(offer, lowest, chosen) for offer in sorted(chosen, key=lambda o: (o.score, o.what.candidate.name))]


def _move(offer: Offer[_What], lowest: float, chosen: Sequence[Offer[_What]]) -> Move:
    what, c = offer.what, offer.what.candidate
    figures = f"{c.rate:.3g} req/s × {what.seconds:.2f} s ÷ {format_bytes(offer.nbytes)}"
    others = ", ".join(other.what.candidate.name for other in chosen if other is not offer)
    if c.gated:
        verdict = "was under way"
    elif offer.score <= lowest:
        verdict = "is the lowest"
    else:
        verdict = f"costs least together with {others}" if others else "is the cheapest that frees enough"
    return Move(what.kind, c.name, offer.nbytes, f"{figures} {verdict}", offer.cost)
