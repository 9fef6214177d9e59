import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.errors import InvalidRequest
from mball.server.http import parse_object

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), json_values))
def test_every_json_object_is_read(value: dict[str, object]) -> None:
    assert parse_object(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"m": {"b": 1, "b": 1}}', "'b' stands twice"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a":' * 100_000, "nested too deep|not JSON"),
    ],
)
def test_what_is_not_a_request(body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse_object(body)
