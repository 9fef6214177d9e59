from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.errors import DeviceOutOfMemory, TransitionError
from mball.memory.ledger import Ledger


def test_a_promise_over_the_rest_is_refused_and_changes_nothing() -> None:
    ledger = Ledger("gpu", 100)
    ledger.promise("a", 60)
    ledger.promise("b", 30)
    with pytest.raises(DeviceOutOfMemory, match="for b"):
        ledger.promise("b", 41)
    assert ledger.holders() == {"a": 60, "b": 30}
    ledger.promise("b", 40)
    assert ledger.free_bytes == 0


def test_no_promise_is_negative() -> None:
    with pytest.raises(TransitionError):
        Ledger("gpu", 100).promise("a", -1)


@given(st.integers(0, 1000), st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 1200))))
def test_promises_never_exceed_the_total(total: int, steps: list[tuple[str, int | None]]) -> None:
    ledger, held = Ledger("gpu", total), dict.fromkeys("abc", 0)
    for holder, nbytes in steps:
        if nbytes is None:
            ledger.give_back(holder)
            held[holder] = 0
            continue
        fits = sum(held.values()) - held[holder] + nbytes <= total
        try:
            ledger.promise(holder, nbytes)
        except DeviceOutOfMemory:
            assert not fits
        else:
            assert fits
            held[holder] = nbytes
        assert ledger.promised_bytes == sum(held.values()) <= total
        assert ledger.promised_bytes + ledger.free_bytes == total
        assert all(ledger.held(name) == nbytes for name, nbytes in held.items())
