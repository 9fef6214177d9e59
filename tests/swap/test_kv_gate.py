"""The gate decides by what was measured, and is right where the figures are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.swap.kv_gate import MARGIN, Gate, Touches
from mball.units import GiB

NOW = 1_000_000.0


def taught(a: float = 1e-4, b: float = 1e-8, rate: float = 4 * GiB) -> Gate:
    gate = Gate()
    for start in range(0, 8192, 512):
        gate.computed(start, 512, 512 * (a + b * (start + 256)))
    for nbytes in (1 << 20, 1 << 24, 1 << 26):
        gate.loaded("store", nbytes, nbytes / rate, NOW)
    return gate


@given(
    a=st.floats(1e-6, 1e-2),
    b=st.floats(0, 1e-6),
    start=st.integers(0, 100_000),
    count=st.integers(16, 50_000),
    rate=st.floats(1e7, 1e11),
)
def test_estimates_are_what_was_measured(a: float, b: float, start: int, count: int, rate: float) -> None:
    gate = taught(a, b, rate)
    assert gate.recompute_s(start, count) == pytest.approx(count * (a + b * (start + count / 2)), rel=1e-3)
    assert gate.reload_s("store", 12345) == pytest.approx(12345 / rate)
    expected = MARGIN * count * 4096 / rate <= count * (a + b * (start + count / 2))
    margin = abs(MARGIN * count * 4096 / rate / (count * (a + b * (start + count / 2))) - 1)
    if margin > 0.01:
        assert gate.better("store", start, count, count * 4096, NOW) is expected


def test_an_8000_token_prefix_of_a_gibibyte() -> None:
    """Of an 8B model at 20,000 tokens/s: from memory and a fast store it is brought back, from a slow disk not."""
    for rate, admitted in ((40 * GiB, True), (6 * GiB, True), (1.1 * GiB, False)):
        gate = taught(a=5e-5, b=0, rate=rate)
        assert gate.admits("store", 0, 8000, GiB, NOW) is admitted
    assert gate.counts == {"store:refused": 1}


def test_what_is_not_known_is_tried_and_what_is_long_ago_once_more() -> None:
    gate = Gate()
    assert gate.better("dram", 0, 16, 1 << 20, NOW)
    gate.loaded("dram", 1 << 20, 10.0, NOW)
    assert gate.better("dram", 0, 16, 1 << 20, NOW), "nothing was computed yet"
    gate.computed(0, 16, 0.001)
    assert not gate.better("dram", 0, 16, 1 << 20, NOW)
    assert gate.better("dram", 0, 16, 1 << 20, NOW + 3600)
    gate.forget("dram")
    assert gate.better("dram", 0, 16, 1 << 20, NOW)


@pytest.mark.parametrize("forced", [True, False])
def test_forced_it_decides_one_way(forced: bool) -> None:
    gate = taught()
    gate.forced = forced
    assert gate.better("store", 0, 16, 1, NOW) is gate.better("store", 0, 16, 1 << 60, NOW) is forced


def test_short_steps_and_copies_say_nothing_of_long_ones() -> None:
    """What is left of a prompt whose beginning is there takes a step of its own: 16 tokens in the time of 512."""
    gate = taught(a=5e-5, b=0, rate=1.1 * GiB)
    for _ in range(1000):
        gate.computed(7984, 16, 0.025)
        gate.loaded("store", 1 << 16, 0.001, NOW)
        gate.loaded("store", 1 << 26, (1 << 26) / (1.1 * GiB), NOW)
    assert gate.recompute_s(0, 8000) == pytest.approx(0.4, rel=0.01)
    assert not gate.better("store", 0, 8000, GiB, NOW)


def test_a_prompt_that_is_hardly_longer_than_a_step_is_computed() -> None:
    """As measured on an H200: 500 tokens take 22 ms, and so does the one step after they were brought back."""
    gate = taught(a=5e-5, b=0, rate=40 * GiB)
    token_bytes = GiB // 8192
    assert gate.admits("store", 0, 496, 496 * token_bytes, NOW)
    for _ in range(50):
        gate.computed(8000, 1, 0.022)
    assert not gate.admits("store", 0, 496, 496 * token_bytes, NOW)
    assert gate.admits("store", 0, 992, 992 * token_bytes, NOW)
    assert gate.better("store", 0, 16, 16 * token_bytes, NOW), "a block is one of many"


def test_what_follows_is_a_short_step_and_no_middling_one() -> None:
    gate = taught(a=5e-5, b=0, rate=10 * GiB)
    token_bytes = GiB // 8192
    for _ in range(50):
        gate.computed(8000, 1, 0.022)
    assert gate.admits("store", 0, 992, 992 * token_bytes, NOW)
    for _ in range(50):
        gate.computed(0, 100, 0.05)
    assert gate.admits("store", 0, 992, 992 * token_bytes, NOW)


def test_copies_that_stay_small_count_in_the_end() -> None:
    gate = taught(rate=40 * GiB)
    for _ in range(100):
        gate.loaded("store", 1 << 16, 0.001, NOW)
    assert gate.reload_s("store", 1 << 16) == pytest.approx(0.001)


def test_new_measurements_count_more() -> None:
    gate = taught(rate=1 * GiB)
    for _ in range(40):
        gate.loaded("store", 1 << 26, (1 << 26) / (8 * GiB), NOW)
    assert gate.reload_s("store", GiB) == pytest.approx(1 / 8, rel=0.05)


def test_one_position_or_noise_that_falls_gives_no_nonsense() -> None:
    gate = Gate()
    assert gate.recompute_s(0, 1) is None
    gate.computed(0, 512, 0.5)
    assert gate.recompute_s(90_000, 512) == pytest.approx(0.5)
    gate.computed(512, 512, 0.1)
    later = gate.recompute_s(90_000, 512)
    assert later is not None
    assert later > 0


def test_touches_are_bounded() -> None:
    touches = Touches(2)
    assert [touches.touch(key) for key in (b"a", b"b", b"a", b"c")] == [1, 1, 2, 1]
    assert (touches.count(b"a"), touches.count(b"b"), touches.count(b"c")) == (2, 0, 1)
