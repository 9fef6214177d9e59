"""The worth of experts, against a plain account of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mball.swap.experts_worth import HALF_LIFE_STEPS, Worth

COUNT = 9
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, COUNT - 1)),
        st.tuples(st.just("chosen"), st.integers(0, COUNT - 1)),
        st.tuples(st.just("add"), st.integers(0, COUNT - 1)),
        st.tuples(st.just("take"), st.integers(0, COUNT - 1)),
    ),
    max_size=80,
)


@given(EVENTS)
def test_the_least_worth_of_those_that_may_go_is_taken(events: list[tuple[str, int]]) -> None:
    worth, held = Worth(COUNT), set[int]()
    for event, expert in events:
        match event:
            case "step":
                worth.step()
            case "chosen":
                worth.chosen(expert, 0.5)
            case "add":
                if expert not in held:
                    worth.add(expert)
                    held.add(expert)
            case "take":
                may_go = {other for other in held if other != expert}
                found = worth.take_least(lambda other, but=expert: other != but)
                assert (found is None) == (not may_go)
                if found is not None:
                    assert worth[found] == min(worth[other] for other in may_go)
                    held.discard(found)
    assert worth.best(range(COUNT), 3) == sorted(range(COUNT), key=lambda expert: (-worth[expert], expert))[:3]


def test_old_choices_fade() -> None:
    worth = Worth(2)
    worth.chosen(0, 1.0)
    for _ in range(HALF_LIFE_STEPS):
        worth.step()
    worth.chosen(1, 1.0)
    assert abs(worth[0] / worth[1] - 0.5) < 1e-9


def test_none_is_taken_that_is_not_worth_less() -> None:
    worth = Worth(2)
    worth.chosen(0, 1.0)
    worth.hold([0])
    assert worth.take_least(lambda _: True, below=worth[0]) is None
    assert worth.take_least(lambda _: True, below=worth[0] * 1.01) == 0
    assert worth.take_least(lambda _: True) is None


def test_a_million_steps_keep_the_order() -> None:
    worth = Worth(3)
    worth.hold([0, 1, 2])
    for step in range(300_000):
        worth.step()
        worth.chosen(0, 1.0)
        if step % 3 == 0:
            worth.chosen(1, 1.0)
    assert worth[0] > worth[1] > worth[2] == 0.0
    assert worth[0] < float("inf")
    assert [worth.take_least(lambda _: True) for _ in range(3)] == [2, 1, 0]
