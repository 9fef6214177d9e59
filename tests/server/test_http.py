import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from mball.errors import InvalidRequest
from mball.server.http import ClientLeft, parse_object, unless_disconnected

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


async def test_work_ends_with_its_client_and_with_whoever_asked_for_it() -> None:
    leaves, ended = asyncio.Event(), []

    async def receive() -> Message:
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        finally:
            ended.append(seconds)
        return "done"

    assert await unless_disconnected(work(0.0), receive) == "done"
    asked = asyncio.create_task(unless_disconnected(work(60.0), receive))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    left = asyncio.create_task(unless_disconnected(work(61.0), receive))
    await asyncio.sleep(0)
    leaves.set()
    async with asyncio.timeout(10):
        with pytest.raises(ClientLeft):
            await left
    assert ended == [0.0, 60.0, 61.0]
    assert left.cancelling() == 0


async def test_who_is_cancelled_as_its_client_leaves_stays_cancelled() -> None:
    left = asyncio.Event()

    async def receive() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    asked = asyncio.create_task(unless_disconnected(asyncio.sleep(60), receive))
    await asyncio.sleep(0)
    left.set()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
