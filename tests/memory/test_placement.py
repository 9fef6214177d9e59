from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from mball.memory.placement import place
from mball.memory.planner import Candidate, Demand, Snapshot


def on(free: int, *candidates: Candidate) -> Snapshot:
    return Snapshot(free, candidates)


rare = Candidate("rare", 40, rate=0.1, promote_s=1.0)
often = Candidate("often", 40, rate=5.0, promote_s=1.0)
busy = Candidate("busy", 40, rate=0.1, promote_s=1.0, in_flight=1)
pinned = Candidate("pinned", 80, pinned=True)


def test_the_tightest_fit_where_there_is_room() -> None:
    placed = place([on(80), on(30), on(50)], Demand("new", 30))
    assert placed is not None
    assert (placed.devices, placed.moves) == ((1,), ([],))


def test_the_device_whose_models_lose_least() -> None:
    placed = place([on(0, often), on(0, pinned), on(0, rare)], Demand("new", 30))
    assert placed is not None
    assert placed.devices == (2,)
    assert [move.model for move in placed.moves[0]] == ["rare"]


def test_no_place_where_no_device_has_room() -> None:
    assert place([on(0, pinned), on(10)], Demand("new", 30)) is None
    assert place([on(40), on(10, pinned)], Demand("new", 30), tensor_parallel_size=2) is None
    assert place([], Demand("new", 30)) is None


def test_tensor_parallel_models_take_several_devices() -> None:
    placed = place([on(0, often), on(30), on(0, rare), on(90)], Demand("large", 30), tensor_parallel_size=2)
    assert placed is not None
    assert placed.devices == (1, 3)
    three = place([on(0, often), on(30), on(0, rare), on(90)], Demand("large", 30), tensor_parallel_size=3)
    assert three is not None
    assert three.devices == (1, 2, 3)
    assert [[move.model for move in moves] for moves in three.moves] == [[], ["rare"], []]


def test_a_model_on_two_devices_that_leaves_frees_both_and_counts_once() -> None:
    wide = Candidate("wide", 40, rate=0.15, promote_s=1.0)
    alone = [replace(rare, name=f"rare{i}") for i in range(2)]
    placed = place(
        [on(0, alone[0]), on(0, wide), on(0, wide), on(0, alone[1])], Demand("new", 30), tensor_parallel_size=2
    )
    assert placed is not None
    assert placed.devices == (1, 2)
    assert [[move.model for move in moves] for moves in placed.moves] == [["wide"], []]
    assert placed.cost == 0.15


def test_what_leaves_one_device_may_have_to_give_more_on_the_next() -> None:
    wide = Candidate("wide", 40, 5, rate=0.1, promote_s=1.0, start_s=1.0)
    placed = place([on(0, wide), on(0, wide)], Demand("new", 42), tensor_parallel_size=2)
    assert placed is not None
    assert [[move.kind for move in moves] for moves in placed.moves] == [["stop"], []]
    uneven = place([on(10, wide), on(0, wide)], Demand("new", 42), tensor_parallel_size=2)
    assert uneven is not None
    assert [[move.kind for move in moves] for moves in uneven.moves] == [["demote"], ["stop"]]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_chosen_device_has_the_room(data: st.DataObject) -> None:
    names = [f"m{i}" for i in range(6)]

    def device() -> Snapshot:
        chosen = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=4))
        return Snapshot(
            data.draw(st.integers(0, 40)),
            tuple(
                Candidate(
                    name,
                    data.draw(st.sampled_from([0, 20, 50])),
                    data.draw(st.sampled_from([0, 3])),
                    in_flight=data.draw(st.sampled_from([0, 0, 1])),
                    rate=data.draw(st.sampled_from([0.1, 1.0, 4.0])),
                    promote_s=1.0,
                )
                for name in chosen
            ),
        )

    devices = [device() for _ in range(data.draw(st.integers(1, 5)))]
    demand = Demand("new", data.draw(st.integers(1, 80)))
    size = data.draw(st.integers(1, 3))
    placed = place(devices, demand, tensor_parallel_size=size)
    if placed is None:
        return
    assert len(set(placed.devices)) == len(placed.moves) == size
    strongest = {move.model: move for moves in placed.moves for move in moves}
    stopped = {move.model for moves in placed.moves for move in moves if move.kind in ("stop", "drain")}
    for number in placed.devices:
        left = devices[number].free_bytes
        for c in devices[number].candidates:
            if c.name in strongest:
                left += c.demote_bytes + (c.stop_bytes if c.name in stopped else 0)
        assert left >= demand.nbytes
