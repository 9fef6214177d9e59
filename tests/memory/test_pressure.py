"""Host pressure: images go before the kernel acts, come back when it eases, and nothing flaps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.memory.pressure import CALM_S, Reading, Throttle, parse, reserve_bytes
from mball.memory.pressure_watch import Gauge
from mball.units import GiB, MiB

QUIET = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
STALLED = "some avg10=40.00 avg60=1.00 avg300=0.00 total=9\nfull avg10=12.50 avg60=0.00 avg300=0.00 total=5\n"


def test_psi_is_parsed() -> None:
    assert parse(QUIET) == (0.0, 0.0)
    assert parse(STALLED) == (40.0, 12.5)
    assert parse(STALLED.splitlines()[0]) == (40.0, 0.0)
    for text in ("nonsense", "some avg60=1.0", "some avg10=x"):
        with pytest.raises(ValueError):
            parse(text)


def test_images_may_have_what_the_host_can_spare() -> None:
    throttle = Throttle(100, 10)
    assert throttle.take(Reading(50), 30, 0.0) == 60
    assert throttle.take(Reading(500), 30, 1.0) == 100
    assert not throttle.pressed


def test_a_shortage_falls_at_once_and_rises_after_a_calm() -> None:
    throttle = Throttle(100, 10)
    throttle.take(Reading(500), 80, 0.0)
    assert throttle.take(Reading(6), 80, 1.0) == 80 - 14
    assert throttle.pressed
    assert throttle.take(Reading(20), 66, 2.0) == 66, "no rise at once"
    assert throttle.take(Reading(60), 66, 5.0) == 66
    assert throttle.take(Reading(15), 66, 9.0) == 66, "the calm begins anew"
    assert throttle.take(Reading(60), 66, 13.0) == 66
    assert throttle.take(Reading(60), 66, 13.0 + CALM_S) == 100
    assert not throttle.pressed


def test_between_the_marks_nothing_goes_and_nothing_comes() -> None:
    throttle = Throttle(100, 10)
    assert throttle.take(Reading(15), 50, 0.0) == 50
    assert not throttle.pressed


def test_work_that_stands_still_takes_a_quarter_whatever_is_available() -> None:
    throttle = Throttle(100, 10)
    assert throttle.take(Reading(1000, some=50.0, full=10.0), 80, 0.0) == 60
    assert throttle.take(Reading(1000, some=50.0, full=10.0), 60, 1.0) == 45


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40), st.floats(0, 20)), min_size=1, max_size=40))
def test_the_limit_never_flaps(steps: list[tuple[int, int, float]]) -> None:
    throttle, now_s, held, pressed_s = Throttle(100, 10), 0.0, 0, float("-inf")
    for available, stall, pause_s in steps:
        now_s += pause_s
        before = throttle.limit_bytes
        limit = throttle.take(Reading(available, full=float(stall)), held, now_s)
        assert 0 <= limit <= 100
        assert limit <= max(held, held + available - 20)
        if available < 10 or stall >= 5:
            pressed_s = now_s
            assert limit <= held
        elif now_s - pressed_s < CALM_S:
            assert limit <= before, "it rose while the pressure was just over"
        held = min(limit, held + available // 3)


def test_the_reserve_follows_the_host() -> None:
    assert reserve_bytes(1 * GiB) == 256 * MiB
    assert reserve_bytes(24 * GiB) == 24 * GiB // 20
    assert reserve_bytes(2048 * GiB) == 4 * GiB


def test_a_gauge_reads_and_waits_without_a_trigger(tmp_path: Path) -> None:
    psi = tmp_path / "memory.pressure"
    psi.write_text(STALLED)
    psi.chmod(0o444)
    gauge = Gauge(psi, available=lambda: 7)
    assert gauge.read() == Reading(7, 40.0, 12.5)
    gauge.wait(0.01)
    gauge.stop()
    gauge.wait(30)
    gauge.close()


def test_a_gauge_works_where_the_kernel_says_nothing(tmp_path: Path) -> None:
    gauge = Gauge(tmp_path / "none", available=lambda: 7)
    assert not gauge.triggers
    assert gauge.read() == Reading(7)
    gauge.close()


def test_a_trigger_is_set_where_it_is_allowed() -> None:
    psi = Path("/proc/pressure/memory")
    if not os.access(psi, os.W_OK):
        pytest.skip("no PSI here, or no leave to set a trigger")
    gauge = Gauge(psi)
    assert gauge.triggers
    gauge.wait(0.01)
    gauge.close()
