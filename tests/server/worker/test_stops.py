"""Stop strings across the borders of pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.server.worker.stops import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """(text given out by each piece and at the end, whether a stop was met)."""
    found = StopStrings(stops)
    out = []
    for piece in pieces:
        text, met = found.add(piece)
        out.append(text)
        if met:
            return out, True
    return [*out, found.flush()], False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "met"),
    [
        ([], ["ab", "c"], ["ab", "c", ""], False),
        (["END"], ["ab E", "N", "D cd"], ["ab ", "", ""], True),
        (["END"], ["ab E", "N", "X"], ["ab ", "", "ENX", ""], False),
        (["END"], ["ab EN"], ["ab ", "EN"], False),
        (["aab"], ["aaab"], ["a"], True),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["\n\n"], ["x\n", "y\n", "\nz"], ["x", "\ny", ""], True),
        (["abc", "b"], ["xabc"], ["xa"], True),
        (["bc", "abc"], ["xabc"], ["x"], True),
    ],
)
def test_cases(stops: list[str], pieces: list[str], expected: list[str], met: bool) -> None:
    assert run(stops, pieces) == (expected, met)


text = st.text("ab\n", max_size=12)


@given(stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4), pieces=st.lists(text, max_size=8))
def test_the_cuts_make_no_difference(stops: list[str], pieces: list[str]) -> None:
    whole, met = run(stops, ["".join(pieces)])
    by_piece, met_by_piece = run(stops, pieces)
    by_letter, met_by_letter = run(stops, list("".join(pieces)))
    assert "".join(whole) == "".join(by_piece) == "".join(by_letter)
    assert met == met_by_piece == met_by_letter
    assert met == any(stop in "".join(pieces) for stop in stops)
    assert not any(stop in "".join(whole) for stop in stops)
