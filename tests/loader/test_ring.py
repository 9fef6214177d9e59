import pytest

from mball.loader.ring import Ring, RingPool
from mball.units import MiB
from tests.device.fake_cuda import FakeRuntime
from tests.loader.files import mapping_of


def test_buffers_are_registered_before_their_first_copy_and_taken_in_turn() -> None:
    runtime = FakeRuntime()
    ring = RingPool().take("a", runtime, MiB, 3)
    assert runtime.registered == {}
    seen = []
    for _ in range(6):
        buffer = ring.take()
        seen.append(buffer.address)
        assert len(buffer.memory) == MiB
        assert (buffer.address in runtime.registered) == (len(seen) > 3)
        ring.pin(buffer)
        ring.give(buffer)
    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:]
    assert set(runtime.registered) == set(seen)
    assert mapping_of(seen[0])[1]["Rss"] >= MiB
    ring.close()
    ring.close()
    assert runtime.registered == {}


def test_a_buffer_waits_for_its_copy() -> None:
    runtime = FakeRuntime()
    ring = RingPool().take("a", runtime, MiB, 1)
    stream = runtime.stream()
    stream.enter()
    targets = RingPool().take("b", runtime, MiB, 1)
    target, buffer = targets.take(), ring.take()
    targets.pin(target)
    ring.pin(buffer)
    buffer.memory[:4] = b"abcd"
    stream.copy(target.address, buffer.address, 4)
    buffer.mark = stream.mark()
    ring.give(buffer)
    assert bytes(target.memory[:4]) == bytes(4)
    ring.take()
    assert bytes(target.memory[:4]) == b"abcd"


def test_a_pool_keeps_one_ring_of_a_kind_within_its_bound() -> None:
    runtime, pool = FakeRuntime(), RingPool(keep_bytes=5 * MiB)
    first = pool.take("a", runtime, MiB, 4)
    second = pool.take("a", runtime, MiB, 4)
    assert first is not second
    for ring in (first, second):
        _used(ring)
    pool.give("a", first)
    pool.give("a", second)
    assert (pool.idle_bytes, len(runtime.registered)) == (4 * MiB, 1)
    other = pool.take("b", runtime, MiB, 4)
    pool.give("b", other)
    assert pool.idle_bytes == 4 * MiB
    assert pool.take("a", runtime, MiB, 4) is first
    pool.give("a", first)
    larger = pool.take("a", runtime, MiB, 5)
    assert larger is not first
    assert runtime.registered == {}
    pool.give("a", larger)
    assert pool.release() == 5 * MiB
    assert pool.idle_bytes == 0


@pytest.mark.parametrize("keep_bytes", [0])
def test_a_pool_that_keeps_nothing(keep_bytes: int) -> None:
    runtime, pool = FakeRuntime(), RingPool(keep_bytes)
    ring = pool.take("a", runtime, MiB, 2)
    _used(ring)
    pool.give("a", ring)
    assert (pool.idle_bytes, runtime.registered) == (0, {})


def _used(ring: Ring) -> None:
    buffer = ring.take()
    ring.pin(buffer)
    ring.give(buffer)
