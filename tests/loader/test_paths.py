from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.loader.paths import EVERY_WAY, Way, choose

ANY = {
    "resident": st.one_of(st.none(), st.floats(0, 1)),
    "cores": st.integers(1, 200),
    "mappable": st.booleans(),
    "direct": st.booleans(),
    "tight": st.booleans(),
}


@pytest.mark.parametrize(
    ("wanted", "changes"),
    [
        (Way.RING, {}),
        (Way.RING, {"resident": None}),
        (Way.MAPPED, {"cores": 2}),
        (Way.RING, {"cores": 2, "mappable": False}),
        (Way.DIRECT, {"resident": 0.5}),
        (Way.DIRECT, {"resident": 0.0, "cores": 2}),
        (Way.RING, {"resident": 0.0, "direct": False}),
        (Way.BUFFERED, {"resident": 0.0, "direct": False, "tight": True}),
        (Way.RING, {"resident": 1.0, "tight": True}),
    ],
)
def test_the_best_way(wanted: Way, changes: dict[str, Any]) -> None:
    facts = {"resident": 1.0, "cores": 16, "mappable": True, "direct": True, "tight": False}
    assert choose(**facts | changes) == wanted


@given(st.fixed_dictionaries(ANY), st.sets(st.sampled_from(Way)))
def test_only_what_is_allowed_and_works(facts: dict[str, Any], allowed: set[Way]) -> None:
    way = choose(**facts, allowed=allowed)
    works = EVERY_WAY - (set() if facts["mappable"] else {Way.MAPPED}) - (set() if facts["direct"] else {Way.DIRECT})
    assert way in (allowed & works or {Way.RING})
