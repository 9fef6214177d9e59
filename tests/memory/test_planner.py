from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from mball.memory.planner import Candidate, Demand, Move, Snapshot, next_change_s, plan

INF = float("inf")
seconds = st.sampled_from([0.0, 0.5, 1.0, 3.0, 10.0])


@st.composite
def candidates(draw: st.DrawFn, name: str) -> Candidate:
    return Candidate(
        name,
        demote_bytes=draw(st.sampled_from([0, 0, 10, 25, 40, 70])),
        stop_bytes=draw(st.sampled_from([0, 2, 5])),
        in_flight=draw(st.sampled_from([0, 0, 0, 2])),
        pinned=draw(st.sampled_from([False, False, False, True])),
        stay_s=draw(seconds),
        min_stay_s=draw(seconds),
        rate=draw(st.sampled_from([0.0, 0.1, 1.0, 7.0])),
        promote_s=draw(seconds),
        start_s=draw(seconds),
        oldest_wait_s=draw(seconds),
        gated=draw(st.booleans()),
    )


@st.composite
def situations(draw: st.DrawFn, most: int = 8) -> tuple[Snapshot, Demand]:
    names = [f"m{i}" for i in range(draw(st.integers(0, most)))]
    snapshot = Snapshot(draw(st.integers(-20, 60)), tuple(draw(candidates(name)) for name in names))
    demand = Demand(
        draw(st.sampled_from(["new", *names])),
        draw(st.integers(0, 200)),
        draw(seconds),
        draw(st.sampled_from([1.0, INF])),
    )
    return snapshot, demand


def protected(c: Candidate, demand: Demand) -> bool:
    """Inside its minimum stay, by the rule as it is written down."""
    overdue = demand.wait_s >= demand.max_wait_s and demand.wait_s >= c.oldest_wait_s
    earned = c.in_flight == 0 or c.stay_s >= c.promote_s
    return c.stay_s < c.min_stay_s and not (overdue and earned)


def legal(c: Candidate, demand: Demand) -> bool:
    return not c.pinned and c.name != demand.model and not (c.demote_bytes > 0 and protected(c, demand))


@settings(max_examples=2000, deadline=None)
@given(situations())
def test_a_plan_frees_enough_and_touches_only_what_it_may(situation: tuple[Snapshot, Demand]) -> None:
    snapshot, demand = situation
    by_name = {c.name: c for c in snapshot.candidates}
    moves = plan(snapshot, demand)
    assert plan(snapshot, demand) == moves
    if moves is None:
        # Not even everything that may be moved frees enough.
        most = sum(c.demote_bytes + c.stop_bytes for c in snapshot.candidates if legal(c, demand))
        assert snapshot.free_bytes + most < demand.nbytes
        return
    assert len({move.model for move in moves}) == len(moves)
    for move in moves:
        c = by_name[move.model]
        assert legal(c, demand)
        assert (move.kind == "drain") == (c.in_flight > 0 and c.demote_bytes > 0)
        assert move.frees_bytes <= c.demote_bytes + c.stop_bytes
        if move.kind == "demote":
            assert move.frees_bytes == c.demote_bytes
    assert snapshot.free_bytes + freed(moves) >= demand.nbytes or not moves
    for left_out in moves:
        assert snapshot.free_bytes + freed(moves) - left_out.frees_bytes < demand.nbytes


@settings(max_examples=500, deadline=None)
@given(situations(most=5))
def test_busy_models_are_left_alone_where_idle_ones_free_enough(situation: tuple[Snapshot, Demand]) -> None:
    snapshot, demand = situation
    idle = [c for c in snapshot.candidates if legal(c, demand) and (c.in_flight == 0 or c.demote_bytes <= 0)]
    moves = plan(snapshot, demand)
    if snapshot.free_bytes + sum(c.demote_bytes + c.stop_bytes for c in idle) >= demand.nbytes:
        assert moves is not None
        assert all(move.kind != "drain" for move in moves)


@settings(max_examples=500, deadline=None)
@given(situations(most=5))
def test_workers_are_stopped_only_where_demotions_do_not_free_enough(situation: tuple[Snapshot, Demand]) -> None:
    snapshot, demand = situation
    awake = [
        c for c in snapshot.candidates if legal(c, demand) and c.demote_bytes > 0 and c.in_flight == 0 and c.stop_bytes
    ]
    if snapshot.free_bytes + sum(c.demote_bytes for c in awake) >= demand.nbytes:
        moves = plan(snapshot, demand) or []
        on_device = {c.name for c in awake}
        assert not [move for move in moves if move.kind == "stop" and move.model in on_device]


def freed(moves: list[Move]) -> int:
    return sum(move.frees_bytes for move in moves)


def names(snapshot: Snapshot, demand: Demand) -> list[tuple[str, str]] | None:
    moves = plan(snapshot, demand)
    return None if moves is None else [(move.kind, move.model) for move in moves]


def test_the_lowest_cost_a_byte_goes_first() -> None:
    rare = Candidate("rare", 40, rate=0.1, promote_s=1.0)
    often = Candidate("often", 40, rate=5.0, promote_s=1.0)
    slow = Candidate("slow", 40, rate=0.1, promote_s=100.0)
    large = Candidate("large", 400, rate=0.3, promote_s=1.0)
    for order in itertools.permutations([rare, often, slow, large]):
        assert names(Snapshot(0, order), Demand("new", 30)) == [("demote", "large")]
    assert names(Snapshot(0, (rare, often, slow)), Demand("new", 30)) == [("demote", "rare")]


def test_what_turns_out_not_to_be_needed_stays() -> None:
    small = Candidate("small", 10, rate=0.0, promote_s=1.0)
    large = Candidate("large", 100, rate=1.0, promote_s=1.0)
    assert names(Snapshot(0, (small, large)), Demand("new", 50)) == [("demote", "large")]


def test_a_stay_ends_early_only_for_the_oldest_and_overdue() -> None:
    staying = Candidate("a", 50, stay_s=1.0, min_stay_s=4.0, promote_s=1.0)
    snapshot = Snapshot(0, (staying,))
    assert names(snapshot, Demand("new", 50, wait_s=1.0, max_wait_s=5.0)) is None
    assert names(snapshot, Demand("new", 50, wait_s=5.0, max_wait_s=5.0)) == [("demote", "a")]
    older = Snapshot(0, (dataclasses.replace(staying, oldest_wait_s=6.0),))
    assert names(older, Demand("new", 50, wait_s=5.0, max_wait_s=5.0)) is None
    assert names(Snapshot(0, (dataclasses.replace(staying, stay_s=4.0),)), Demand("new", 50)) == [("demote", "a")]


def test_an_overdue_demand_leaves_a_busy_model_as_long_as_its_swap_took() -> None:
    busy = Candidate("a", 50, in_flight=2, stay_s=1.0, min_stay_s=8.0, promote_s=2.0)
    demand = Demand("new", 50, wait_s=9.0, max_wait_s=5.0)
    assert names(Snapshot(0, (busy,)), demand) is None
    assert names(Snapshot(0, (dataclasses.replace(busy, stay_s=2.0),)), demand) == [("drain", "a")]


def test_a_plan_made_anew_does_not_reverse_what_is_under_way() -> None:
    gated = Candidate("gated", 50, in_flight=1, rate=9.0, promote_s=1.0, gated=True)
    cheaper = Candidate("cheaper", 50, in_flight=1, rate=0.1, promote_s=1.0)
    assert names(Snapshot(0, (cheaper, gated)), Demand("new", 50)) == [("drain", "gated")]
    idle = dataclasses.replace(cheaper, in_flight=0)
    assert names(Snapshot(0, (idle, gated)), Demand("new", 50)) == [("demote", "cheaper")]


def test_sleeping_workers_are_stopped_where_that_is_what_is_lacking() -> None:
    asleep = Candidate("asleep", 0, 5, rate=0.0, start_s=3.0)
    awake = Candidate("awake", 90, 5, rate=9.0, promote_s=1.0, start_s=3.0)
    assert names(Snapshot(2, (asleep, awake)), Demand("new", 6)) == [("stop", "asleep")]
    assert names(Snapshot(0, (asleep, awake)), Demand("new", 100)) == [("stop", "asleep"), ("stop", "awake")]
    assert names(Snapshot(0, (asleep, awake)), Demand("new", 101)) is None


def test_when_time_alone_helps() -> None:
    staying = Candidate("a", 50, stay_s=1.0, min_stay_s=4.0, promote_s=0.0)
    assert next_change_s(Snapshot(0, (staying,)), Demand("new", 50, wait_s=1.0, max_wait_s=9.0)) == 3.0
    assert next_change_s(Snapshot(0, (staying,)), Demand("new", 50, wait_s=1.0, max_wait_s=2.0)) == 1.0
    pinned = dataclasses.replace(staying, pinned=True)
    assert next_change_s(Snapshot(0, (pinned,)), Demand("new", 50, wait_s=1.0)) is None


def test_two_hundred_models_are_planned_for_quickly() -> None:
    many = tuple(Candidate(f"m{i}", 10 + i % 7, 1, rate=i % 11, promote_s=1.0) for i in range(200))
    moves = plan(Snapshot(0, many), Demand("new", 800))
    assert moves is not None
    assert freed(moves) >= 800
