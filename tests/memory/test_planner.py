from __future__ import annotations

import dataclasses
import itertools

import pytest

from mball.memory.planner import Candidate, Demand, Snapshot, next_change_s, plan


def names(snapshot: Snapshot, demand: Demand) -> list[tuple[str, str]] | None:
    moves = plan(snapshot, demand)
    return None if moves is None else [(move.kind, move.model) for move in moves]


def test_the_lowest_cost_a_byte_goes_first() -> None:
    rare = Candidate("rare", 40, rate=0.1, promote_s=1.0)
    often = Candidate("often", 40, rate=5.0, promote_s=1.0)
    slow = Candidate("slow", 40, rate=0.1, promote_s=100.0)
    large = Candidate("large", 400, rate=0.3, promote_s=1.0)
    for order in itertools.permutations([rare, often, slow, large]):
        assert names(Snapshot(0, order), Demand("new", 200)) == [("demote", "large")]
    assert names(Snapshot(0, (rare, often, slow)), Demand("new", 30)) == [("demote", "rare")]


def test_a_dearer_byte_goes_where_it_costs_less_in_all() -> None:
    rare = Candidate("rare", 40, rate=0.1, promote_s=1.0)
    large = Candidate("large", 400, rate=0.3, promote_s=1.0)
    assert names(Snapshot(0, (large, rare)), Demand("new", 30)) == [("demote", "rare")]


def test_greedy_alone_would_pay_too_much() -> None:
    # By score: a, then b and c; b and c together are cheaper than a with either.
    a = Candidate("a", 60, rate=6.0, promote_s=1.0)
    b = Candidate("b", 50, rate=5.2, promote_s=1.0)
    c = Candidate("c", 50, rate=5.2, promote_s=1.0)
    assert names(Snapshot(0, (a, b, c)), Demand("new", 100)) == [("demote", "b"), ("demote", "c")]


def test_whoever_is_waited_for_is_the_last_to_be_stopped() -> None:
    wanted = Candidate("wanted", 0, 2, rate=0.001, queued=1, start_s=5.0)
    often = Candidate("often", 0, 2, rate=0.9, start_s=5.0)
    assert names(Snapshot(0, (wanted, often)), Demand("new", 2)) == [("stop", "often")]


def test_the_reason_names_its_numbers() -> None:
    gib = 1 << 30
    b = Candidate("B", 15 * gib, rate=0.02, promote_s=0.4)
    c = Candidate("C", 15 * gib, rate=0.5, promote_s=0.4)
    one = plan(Snapshot(0, (c, b)), Demand("new", 10 * gib))
    assert one is not None
    assert one[0].reason == "0.02 req/s × 0.40 s ÷ 15.0 GiB is the lowest"
    assert one[0].cost == pytest.approx(0.008)
    both = plan(Snapshot(0, (c, b)), Demand("new", 30 * gib))
    assert both is not None
    assert both[1].reason == "0.5 req/s × 0.40 s ÷ 15.0 GiB costs least together with B"


def test_balloons_are_asked_before_anything_is_demoted() -> None:
    busy = Candidate("busy", 50, balloon_bytes=20, in_flight=2, rate=9.0, promote_s=1.0, balloon_s=5.0)
    idle = Candidate("idle", 50, rate=0.0, promote_s=1.0)
    assert names(Snapshot(0, (busy, idle)), Demand("new", 20)) == [("balloon", "busy")]
    assert names(Snapshot(0, (busy, idle)), Demand("new", 21)) == [("demote", "idle")]
    assert names(Snapshot(0, (busy, idle)), Demand("new", 70)) == [("demote", "idle"), ("balloon", "busy")]
    pinned = dataclasses.replace(busy, pinned=True)
    assert names(Snapshot(0, (pinned, idle)), Demand("new", 20)) == [("demote", "idle")]


def test_a_higher_priority_keeps_its_place_until_the_other_is_overdue() -> None:
    high = Candidate("high", 50, priority=1, stay_s=9.0, min_stay_s=1.0, promote_s=1.0)
    snapshot = Snapshot(0, (high,))
    assert names(snapshot, Demand("new", 50, wait_s=1.0, max_wait_s=5.0)) is None
    assert names(snapshot, Demand("new", 50, wait_s=1.0, max_wait_s=5.0, priority=1)) == [("demote", "high")]
    assert names(snapshot, Demand("new", 50, wait_s=5.0, max_wait_s=5.0)) == [("demote", "high")]


def test_a_demand_whose_time_or_priority_falls_does_not_reverse_a_drain() -> None:
    draining = Candidate("a", 50, in_flight=1, priority=1, stay_s=1.0, min_stay_s=9.0, promote_s=1.0)
    assert names(Snapshot(0, (draining,)), Demand("new", 50, wait_s=5.0, max_wait_s=5.0)) == [("drain", "a")]
    gated = dataclasses.replace(draining, gated=True)
    assert names(Snapshot(0, (gated,)), Demand("new", 50, wait_s=0.1, max_wait_s=5.0)) == [("drain", "a")]


def test_an_image_that_saves_the_least_makes_room_in_dram() -> None:
    fast = Candidate("fast", image_bytes=40, rate=9.0, promote_s=1.0, source_s=1.1)
    slow = Candidate("slow", image_bytes=40, rate=1.0, promote_s=1.0, source_s=20.0)
    awake = Candidate("awake", 90, image_bytes=40, rate=5.0, promote_s=1.0, source_s=9.0)
    snapshot = Snapshot(100, (fast, slow, awake), dram_free_bytes=10)
    assert names(snapshot, Demand("new", 50, dram_bytes=10)) == []
    assert names(snapshot, Demand("new", 50, dram_bytes=40)) == [("drop", "fast")]
    assert names(snapshot, Demand("new", 150, dram_bytes=40)) == [("demote", "awake"), ("drop", "fast")]
    assert names(snapshot, Demand("new", 50, dram_bytes=131)) is None


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


LAYERED = Candidate("layered", 60, balloon_bytes=10, layer_bytes=40, rate=1.0, promote_s=3.0, layer_s=2.0, in_flight=2)
"""All its layers cost 2 seconds of waiting a second."""


def test_layers_go_where_that_costs_less_than_a_whole_model() -> None:
    cheap = Candidate("cheap", 60, rate=0.4, promote_s=3.0)
    dear = Candidate("dear", 60, rate=0.8, promote_s=3.0)
    assert names(Snapshot(0, (LAYERED,)), Demand("new", 10)) == [("balloon", "layered")]
    # 20 bytes beyond what nobody misses: 1 × 2 s × 20 ÷ 40.
    assert names(Snapshot(0, (LAYERED, dear)), Demand("new", 30)) == [("layers", "layered")]
    assert names(Snapshot(0, (LAYERED, dear)), Demand("new", 50)) == [("layers", "layered")]
    assert names(Snapshot(0, (LAYERED, cheap)), Demand("new", 50)) == [("demote", "cheap")]
    (move,) = plan(Snapshot(0, (LAYERED, dear)), Demand("new", 30)) or []
    assert (move.frees_bytes, move.cost) == (30, 1.0)
    assert "1 req/s × 1.00 s ÷ 30" in move.reason


def test_layers_are_not_taken_from_whom_a_plan_may_not_slow() -> None:
    for spared in (
        dataclasses.replace(LAYERED, pinned=True),
        dataclasses.replace(LAYERED, priority=1, min_stay_s=9.0),
        dataclasses.replace(LAYERED, name="new"),
    ):
        assert names(Snapshot(0, (spared,)), Demand("new", 30)) is None
    # Its door is shut already: it goes on leaving.
    assert names(Snapshot(0, (dataclasses.replace(LAYERED, gated=True),)), Demand("new", 30)) == [("drain", "layered")]
