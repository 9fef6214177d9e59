from __future__ import annotations

import math

from hypothesis import assume, given
from hypothesis import strategies as st

from mball.swap.policy import HALF_LIFE_S, Candidate, Worth, victims

seconds = st.floats(0.001, 1e5)
rates = st.floats(1e-6, 1e3)
times = st.floats(1.6e9, 1.9e9)


@given(seconds, rates, times)
def test_a_rate_comes_back_and_halves(saved_s: float, rate: float, at_s: float) -> None:
    worth = Worth.of(saved_s, rate, at_s)
    assert math.isclose(worth.rate(at_s), rate)
    assert math.isclose(worth.rate(at_s + HALF_LIFE_S), rate / 2, rel_tol=1e-6)
    assert math.isclose(worth.rate(at_s - 1e6), rate), "a clock set back makes nothing hotter"


@given(seconds, rates, times, seconds, rates, times, st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_scores_order_by_value(
    s1: float, r1: float, t1: float, s2: float, r2: float, t2: float, b1: int, b2: int
) -> None:
    one, other = Worth.of(s1, r1, t1), Worth.of(s2, r2, t2)
    for later in (0.0, HALF_LIFE_S):
        # In logarithms: what was not used for years is too small for a float.
        now = max(t1, t2) + later
        value = [math.log2(s * r / b) - (now - t) / HALF_LIFE_S for s, r, t, b in ((s1, r1, t1, b1), (s2, r2, t2, b2))]
        assume(abs(value[0] - value[1]) > 1e-6)
        assert (value[0] < value[1]) == (one.score(b1) < other.score(b2))


@given(seconds, rates, times)
def test_a_use_makes_hotter(saved_s: float, rate: float, at_s: float) -> None:
    worth = Worth.of(saved_s, rate, at_s)
    assert worth.used(at_s + 5).score(100) > worth.score(100)


def test_what_saves_nothing_is_worth_least() -> None:
    assert Worth.of(0.0, 5.0, 1.0).score(10) == Worth.of(5.0, 0.0, 1.0).score(10) == -math.inf


@st.composite
def forests(draw: st.DrawFn) -> list[Candidate]:
    found: list[Candidate] = []
    for number in range(draw(st.integers(1, 25))):
        parent = draw(st.none() | st.integers(0, number - 1)) if number else None
        key = None if parent is None else bytes([parent])
        found.append(Candidate(bytes([number]), key, draw(st.integers(1, 4)), draw(st.floats(0, 10))))
    return found


@given(forests(), st.integers(1, 60), st.floats(0, 11), st.sets(st.integers(0, 24).map(lambda n: bytes([n]))))
def test_victims(found: list[Candidate], needed: int, below: float, kept: set[bytes]) -> None:
    by_key = {candidate.key: candidate for candidate in found}
    chosen = victims(found, needed, below=below, kept=kept)

    def free_to_go(gone: set[bytes]) -> list[Candidate]:
        parents = {c.parent for c in found if c.key not in gone}
        return [c for c in found if c.key not in gone | kept and c.key not in parents and c.score < below]

    gone: set[bytes] = set()
    freed = 0
    for key in chosen if chosen is not None else []:
        assert freed < needed, "no more than are needed"
        allowed = free_to_go(gone)
        assert by_key[key].score == min(c.score for c in allowed), "the least valuable, children before parents"
        assert key in {c.key for c in allowed}
        gone.add(key)
        freed += by_key[key].slots
    if chosen is not None:
        assert freed >= needed
        return
    while allowed := free_to_go(gone):
        least = min(allowed, key=lambda c: c.score)
        gone.add(least.key)
        freed += least.slots
    assert freed < needed, "None only where there is no way"


def test_a_batch_goes_beyond_what_is_needed_only_below_the_bound() -> None:
    found = [Candidate(bytes([n]), None, 1, float(n)) for n in range(10)]
    assert victims(found, 1, wanted=4, below=3.0) == [bytes([0]), bytes([1]), bytes([2])]
