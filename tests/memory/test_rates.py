from __future__ import annotations

import pytest

from mball.memory.rates import Rate, Smoothed
from mball.memory.settings import Settings


def test_a_steady_rate_is_found_and_forgotten() -> None:
    rate = Rate(60.0)
    for i in range(2400):
        rate.count(i * 0.5)
    assert rate.at(1200.0) == pytest.approx(2.0, rel=0.02)
    assert rate.at(1200.0 + 60.0) == pytest.approx(2.0 / 2.718, rel=0.02)
    assert rate.at(1200.0 + 3600.0) < 1e-6
    assert Rate(60.0).at(5.0) == 0.0


def test_smoothing_begins_with_the_first_and_follows() -> None:
    smoothed = Smoothed()
    smoothed.add(10.0)
    assert smoothed.value == 10.0
    for _ in range(30):
        smoothed.add(2.0)
    assert smoothed.value == pytest.approx(2.0, abs=0.01)


def test_a_stay_bounds_the_share_of_time_that_swapping_takes() -> None:
    settings = Settings(swap_time_share=0.2, max_stay_s=100.0)
    for swap_s in (0.1, 1.0, 10.0):
        assert swap_s / (swap_s + settings.stay_s(swap_s)) == pytest.approx(0.2)
    assert settings.stay_s(1000.0) == 100.0
    assert Settings(min_stay_s=3.0).stay_s(0.0) == 3.0
