from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.loader.paths import FEW_CORES
from mball.loader.tuning import DISK, FEW_THREADS, PINNED_BYTES, PINNED_SHARE, profile
from mball.units import GiB, MiB


@pytest.fixture(autouse=True, scope="module")
def _nothing_remembered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_large_machine() -> None:
    found = profile(cpus=16, room_bytes=100 * GiB)
    assert (found.threads, found.cores) == (14, 14)
    assert found.buffers > found.threads
    assert found.chunk_bytes == found.buffer_bytes


def test_few_cores_take_windows() -> None:
    for cpus in range(1, FEW_CORES + 1):
        found = profile(cpus=cpus, room_bytes=100 * GiB)
        assert found.threads == FEW_THREADS
        assert found.chunk_bytes == found.window_bytes
    assert profile(2, cpus=64, room_bytes=100 * GiB).chunk_bytes == found.window_bytes


@given(st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 256), st.integers(0, 10**12))
def test_pinned_memory_is_bounded_and_each_thread_has_a_buffer(threads: int | None, cpus: int, room_bytes: int) -> None:
    found = profile(threads, cpus=cpus, room_bytes=room_bytes)
    assert found.buffers >= found.threads >= 1
    assert found.buffer_bytes % MiB == 0
    pinned = found.buffers * found.buffer_bytes
    windows = found.window_bytes * found.threads * (found.depth + 1)
    assert windows <= max(room_bytes * PINNED_SHARE, found.threads * (found.depth + 1) * MiB)
    assert found.window_bytes % MiB == 0
    assert pinned <= max(min(PINNED_BYTES, room_bytes * PINNED_SHARE), found.threads * MiB)


@pytest.mark.parametrize("cpus", [1, 2, 8, 64])
def test_a_disk_gets_many_large_reads_whatever_the_cores(cpus: int) -> None:
    found = profile(cpus=cpus, room_bytes=100 * GiB, cold=True)
    assert (found.threads, found.buffer_bytes) == (DISK.threads, DISK.buffer_bytes)
    assert found.cores == min(cpus, DISK.threads)
    teed = profile(cpus=cpus, room_bytes=100 * GiB, cold=True, tee=True)
    assert teed.threads > found.threads
    assert teed.buffers * teed.buffer_bytes <= PINNED_BYTES
    assert profile(3, cpus=cpus, room_bytes=100 * GiB, cold=True).threads == 3
