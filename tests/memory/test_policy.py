"""What `decide` begins, over situations in virtual time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mball.memory.look import Decision, Look, Standing
from mball.memory.planner import Candidate, Move
from mball.memory.policy import decide, image_drops, turn
from mball.memory.settings import Settings
from mball.memory.states import Process

RULES = Settings(max_wait_s=5.0, hold_s=1.0, max_starts=2, drain_s=60.0)


def awake(name: str, number: int = 0, nbytes: int = 50, **values: Any) -> Standing:
    candidate = {"stay_s": 9.0, "promote_s": 0.5, **{k: v for k, v in values.items() if k in Candidate.__slots__}}
    rest = {k: v for k, v in values.items() if k not in Candidate.__slots__}
    return Standing(
        Candidate(name, nbytes, 2, **candidate),
        number,
        Process.ALIVE,
        on_device=True,
        is_open=rest.pop("is_open", True),
        held_bytes=nbytes + 2,
        needed_bytes=nbytes + 2,
        context_bytes=2,
        **rest,
    )


def asleep(name: str, number: int = 1, nbytes: int = 50, wait_s: float = 1.0, **values: Any) -> Standing:
    candidate = {"promote_s": 0.5, "source_s": 0.5, **{k: v for k, v in values.items() if k in Candidate.__slots__}}
    queued = candidate.setdefault("queued", 1)
    rest = {"queued": queued, **{k: v for k, v in values.items() if k not in Candidate.__slots__}}
    return Standing(
        Candidate(name, 0, 2, oldest_wait_s=wait_s if queued else 0.0, **candidate),
        number,
        Process.ALIVE,
        held_bytes=2,
        needed_bytes=nbytes + 2,
        context_bytes=2,
        **rest,
    )


def gone(name: str, number: int = 2, wait_s: float = 1.0, **values: Any) -> Standing:
    return Standing(
        Candidate(name, oldest_wait_s=wait_s),
        number,
        Process.GONE,
        needed_bytes=52,
        context_bytes=2,
        queued=1,
        **values,
    )


def on(free: int, *standings: Standing, **values: Any) -> Decision:
    return decide(Look(free, standings, **values), RULES)


def test_nothing_waits_nothing_happens() -> None:
    decision = on(10, awake("a"), asleep("b", queued=0))
    assert decision.bring is None
    assert [decision.starts, decision.fills, decision.send, decision.gates] == [[], [], [], set()]


def test_the_oldest_is_brought_in() -> None:
    decision = on(100, asleep("young", 1, wait_s=1.0), asleep("old", 2, wait_s=2.0))
    assert decision.bring is not None
    assert (decision.bring.model, decision.bring.verb, decision.bring.nbytes) == ("old", "promote", 50)


def test_a_higher_priority_is_served_before_an_older_one_until_that_is_overdue() -> None:
    high, low = asleep("high", 1, wait_s=0.1, priority=1), asleep("low", 2, wait_s=4.0)
    assert turn(high, RULES) < turn(low, RULES)
    late = replace(low, candidate=replace(low.candidate, oldest_wait_s=5.0))
    assert turn(late, RULES) < turn(high, RULES)


def test_an_idle_model_is_demoted_for_it_and_a_busy_one_drained() -> None:
    decision = on(0, awake("a"), asleep("b"))
    assert decision.bring is not None
    assert [(move.kind, move.model) for move in decision.bring.moves] == [("demote", "a")]
    drained = on(0, awake("a", in_flight=1), asleep("b"))
    assert drained.bring is None
    assert drained.gates == {"a"}
    assert drained.again_s == RULES.drain_s


def test_an_idle_stay_ends_early_while_switching_time_is_saved_up() -> None:
    staying = awake("a", stay_s=1.0, min_stay_s=9.0)
    early = on(0, staying, asleep("b"), saved_s=0.1)
    assert early.bring is not None
    assert [move.model for move in early.bring.moves] == ["a"]
    spent = on(0, staying, asleep("b"), saved_s=-0.2)
    assert spent.bring is None
    assert spent.again_s == 0.2 / RULES.swap_time_share
    busy = on(0, awake("a", stay_s=0.1, min_stay_s=9.0, in_flight=1), asleep("b"), saved_s=9.0)
    assert (busy.bring, busy.gates) == (None, set())


def test_one_transition_at_a_time_and_doors_stay_shut_meanwhile() -> None:
    gated = awake("a", in_flight=1, is_open=False, gated_s=3.0, gated=True)
    decision = on(100, gated, asleep("b"), gone("c"), busy=True)
    assert decision.bring is None
    assert decision.gates == {"a"}
    assert [start.model for start in decision.starts] == ["c"]


def test_a_demand_whose_time_or_priority_falls_does_not_open_a_door_again() -> None:
    draining = awake("a", in_flight=1, is_open=False, gated_s=3.0, gated=True, stay_s=1.0, min_stay_s=9.0, priority=2)
    assert on(0, draining, asleep("b", wait_s=9.0, priority=2)).gates == {"a"}
    assert on(0, draining, asleep("b", wait_s=0.1, priority=0)).gates == {"a"}
    assert on(0, draining).gates == set()


def test_what_leaves_for_one_is_not_counted_on_for_the_next() -> None:
    decision = on(0, awake("a"), awake("busy", 1, in_flight=1), asleep("old", 2, wait_s=3.0), gone("next", 3))
    assert decision.bring is not None
    assert [move.model for move in decision.bring.moves] == ["a"]
    assert decision.gates == {"busy"}


def test_no_more_starts_at_once_than_allowed() -> None:
    waiting = [gone(f"m{i}", i) for i in range(4)]
    assert [start.model for start in on(100, *waiting).starts] == ["m0", "m1"]
    assert [start.model for start in on(100, *waiting, starting=1).starts] == ["m0"]


def test_what_an_arriving_model_will_need_is_no_others() -> None:
    arriving = replace(asleep("a"), arriving=True, settled=False)
    assert on(51, arriving, gone("b")).starts == []
    assert len(on(52, arriving, gone("b")).starts) == 1


def test_a_long_load_goes_through_an_image_while_others_switch() -> None:
    slow = asleep("slow", 1, wait_s=3.0, promote_s=9.0, source_s=9.0, image_wanted_bytes=40)
    decision = on(100, slow, asleep("quick", 2), dram_free_bytes=40)
    assert [fill.model for fill in decision.fills] == ["slow"]
    assert decision.bring is not None
    assert decision.bring.model == "quick"
    assert on(100, replace(slow, filling=True), dram_free_bytes=40).bring is None
    reading = asleep("first", 5, filling=True, wait_s=9.0)
    behind = on(100, slow, reading, dram_free_bytes=40)
    assert (behind.fills, behind.bring) == ([], None)
    ahead = on(100, slow, replace(reading, queued=0), dram_free_bytes=40)
    assert [fill.model for fill in ahead.fills] == ["slow"]
    without = on(100, slow, dram_free_bytes=39)
    assert without.fills == []
    assert without.bring is not None
    short = replace(slow, candidate=replace(slow.candidate, promote_s=0.9))
    assert on(100, short, dram_free_bytes=40).fills == []


def test_while_nobody_waits_the_image_that_saves_most_is_filled() -> None:
    idle = [
        asleep(name, number, queued=0, rate=rate, promote_s=9.0, source_s=9.0, image_wanted_bytes=40)
        for number, (name, rate) in enumerate((("rare", 0.1), ("often", 0.3)))
    ]
    assert [fill.model for fill in on(0, *idle, dram_free_bytes=40).fills] == ["often"]
    assert on(0, *idle, asleep("waits", 5, filling=True), dram_free_bytes=40).fills == []
    kept = awake("kept", 7, image_bytes=40, rate=0.2, source_s=9.0)
    assert on(0, *idle, kept).fills == []
    rarely = replace(kept, candidate=replace(kept.candidate, rate=0.1))
    assert [move.model for move in on(0, *idle, rarely).fills[0].drops] == ["kept"]


def test_whose_requests_wait_gets_its_image_before_any_other() -> None:
    kept = Candidate("kept", image_bytes=40, rate=0.4, source_s=9.0)
    wanting = Candidate("new", rate=0.001, source_s=9.0)
    assert image_drops(wanting, 40, [kept], 0) is None
    waiting = replace(wanting, queued=1)
    assert [move.model for move in image_drops(waiting, 40, [kept], 0) or ()] == ["kept"]
    assert image_drops(waiting, 41, [kept], 0) is None


def test_an_idle_time_that_is_over_ends_a_stay() -> None:
    assert on(0, awake("a", idle_left_s=0.0)).send == [Move("demote", "a", 50, "not used for its keep_alive_s")]
    assert on(0, awake("a", idle_left_s=0.0, pinned=True)).send == []
    early = on(0, awake("a", idle_left_s=7.0))
    assert (early.send, early.again_s) == ([], 7.0)


def test_unloading_waits_for_those_inside() -> None:
    assert on(0, awake("a", unload=True)).send == [Move("demote", "a", 50, "unloaded on request")]
    assert on(0, awake("a", unload=True, in_flight=1)).gates == {"a"}
    assert on(0, asleep("a", queued=0, unload=True)).gone == ["a"]


def test_one_that_holds_more_than_promised_gets_it_or_others_make_room() -> None:
    assert on(5, awake("a", over_bytes=5)).grow == ["a"]
    assert [move.model for move in on(0, awake("a", over_bytes=5), awake("idle", 1)).send] == ["idle"]
    assert [move.model for move in on(0, awake("a", over_bytes=5), awake("busy", 1, in_flight=1)).send] == ["a"]


def test_what_others_took_is_given_up_by_the_idle_first() -> None:
    models = awake("busy", 0, in_flight=1), awake("idle", 1), awake("kept", 2, pinned=True)
    decision = on(0, *models, excess_bytes=30)
    assert [(move.kind, move.model) for move in decision.send] == [("demote", "idle")]
    assert decision.gates == set()
    assert "30 B of what was promised are held by others" in decision.send[0].reason


def test_where_the_idle_are_too_few_the_busy_are_drained_and_the_pinned_stay() -> None:
    decision = on(0, awake("busy", 0, in_flight=1), awake("idle", 1), awake("kept", 2, pinned=True), excess_bytes=90)
    assert [move.model for move in decision.send] == ["idle"]
    assert decision.gates == {"busy"}
    assert on(0, awake("kept", pinned=True), excess_bytes=90).send == []


def test_a_busy_one_that_has_just_come_is_drained_once_its_swap_has_paid() -> None:
    decision = on(0, awake("busy", in_flight=1, stay_s=0.1, min_stay_s=3.0), excess_bytes=10)
    assert (decision.gates, decision.send) == (set(), [])
    assert 0 < decision.again_s <= 0.4


def test_sleeping_workers_go_too_where_others_took_all() -> None:
    decision = on(0, asleep("a", queued=0), asleep("b", queued=0), excess_bytes=3)
    assert [(move.kind, move.model) for move in decision.send] == [("stop", "a"), ("stop", "b")]


def test_nothing_comes_while_more_is_promised_than_there_is() -> None:
    decision = on(0, awake("kept", pinned=True), gone("b"), excess_bytes=10)
    assert (decision.starts, decision.bring, decision.crowded) == ([], None, ["b"])


def test_images_of_other_devices_may_go_and_their_reading_is_waited_for() -> None:
    wanting = asleep("b", promote_s=9.0, source_s=9.0, image_wanted_bytes=40)
    elsewhere = [Candidate("far", image_bytes=40, rate=0.001, source_s=1.0)]
    [fill] = on(60, wanting, elsewhere=elsewhere).fills
    assert (fill.model, [move.model for move in fill.drops]) == ("b", ["far"])
    waits = on(60, wanting, elsewhere=elsewhere, reading=True)
    assert (waits.fills, waits.bring) == ([], None)


def test_a_preload_takes_nobodys_place() -> None:
    assert on(0, awake("a"), asleep("b", queued=0, wanted=True)).forget == ["b"]
    brought = on(50, awake("a"), asleep("b", queued=0, wanted=True)).bring
    assert brought is not None
    assert brought.moves == ()


@st.composite
def looks(draw: st.DrawFn) -> Look:
    standings: list[Standing] = []
    for number in range(draw(st.integers(0, 7))):
        name = f"m{number}"
        values = {
            "rate": draw(st.sampled_from([0.0, 0.1, 2.0])),
            "pinned": draw(st.sampled_from([False, False, True])),
            "settled": draw(st.sampled_from([True, True, True, False])),
        }
        kind = draw(st.sampled_from(["awake", "asleep", "gone"]))
        if kind == "awake":
            shut = draw(st.sampled_from([None, None, 1.0]))
            standings.append(
                awake(
                    name,
                    number,
                    draw(st.sampled_from([20, 50])),
                    in_flight=draw(st.sampled_from([0, 0, 2])),
                    stay_s=draw(st.sampled_from([0.0, 9.0])),
                    min_stay_s=3.0,
                    gated_s=shut,
                    gated=shut is not None,
                    is_open=shut is None,
                    unload=draw(st.sampled_from([False, False, False, True])),
                    **values,
                )
            )
        elif kind == "asleep":
            standings.append(
                asleep(name, number, draw(st.sampled_from([20, 50])), draw(st.sampled_from([0.1, 7.0])), **values)
            )
        else:
            standings.append(gone(name, number, draw(st.sampled_from([0.1, 7.0]))))
    excess = draw(st.sampled_from([0, 0, 10, 60]))
    return Look(
        0 if excess else draw(st.integers(0, 120)),
        tuple(standings),
        busy=draw(st.booleans()),
        starting=draw(st.integers(0, 2)),
        excess_bytes=excess,
    )


@settings(max_examples=1000, deadline=None)
@given(looks())
def test_no_decision_promises_more_than_there_is_or_moves_what_is_in_use(look: Look) -> None:
    decision = decide(look, RULES)
    by_name = {s.name: s for s in look.standings}
    brought = [decision.bring] if decision.bring is not None else []
    assert not (look.busy and (brought or decision.send))
    assert not (brought and decision.send)
    assert look.starting + len(decision.starts) <= max(RULES.max_starts, look.starting)
    free = look.free_bytes - look.excess_bytes - sum(start.nbytes for start in decision.starts)
    for bring in brought:
        free += sum(move.frees_bytes for move in bring.moves) - bring.nbytes
        for move in bring.moves:
            victim = by_name[move.model]
            assert victim.settled
            assert not victim.candidate.pinned
            assert not victim.candidate.in_flight
            assert move.model != bring.model
    assert free >= 0 or not (brought or decision.starts)
    for move in decision.send:
        assert not by_name[move.model].candidate.in_flight
        assert not by_name[move.model].candidate.pinned or by_name[move.model].unload
    begun = [bring.model for bring in (*brought, *decision.starts)]
    assert len(set(begun)) == len(begun)
    assert all(by_name[name].settled for name in begun)
    moved = {move.model for bring in brought for move in bring.moves} | {move.model for move in decision.send}
    assert not moved & {*begun, *decision.gates}


def fetched(*standings: Standing, **values: Any) -> list[str]:
    look = Look(values.pop("free_bytes", 0), standings, dram_free_bytes=values.pop("dram_free_bytes", 60), **values)
    return [fill.model for fill in decide(look, RULES).fills]


def test_what_rests_in_the_swap_store_comes_to_dram_while_it_waits() -> None:
    stored = asleep("s", stored=True, image_wanted_bytes=50)
    leaving = awake("a", in_flight=1, stay_s=99.0, min_stay_s=1.0)
    staying = awake("a", in_flight=1, stay_s=1.0, min_stay_s=99.0)
    for other, values in ((leaving, {}), (staying, {}), (awake("a"), {"busy": True})):
        assert fetched(other, stored, **values) == ["s"]
        assert fetched(other, replace(stored, stored=False), **values) == [], "from its files it is not"
        assert fetched(other, replace(stored, queued=0), **values) == []
        assert fetched(other, stored, dram_free_bytes=49, **values) == [], "no image goes for it"
        assert fetched(other, stored, reading=True, **values) == [], "the disk has work"
        assert fetched(other, replace(stored, filling=True), **values) == []
        busy = asleep("b", 3, filling=True, image_wanted_bytes=50)
        assert fetched(other, stored, busy, **values) == []
        coming = replace(asleep("c", 4), arriving=True, settled=False)
        assert fetched(other, stored, coming, **values) == [], "another is loading from the disk"
        fast = replace(coming, candidate=replace(coming.candidate, image_bytes=50))
        assert fetched(other, stored, fast, **values) == ["s"]
    assert fetched(stored, free_bytes=100) == [], "its turn has come: straight to the device"
