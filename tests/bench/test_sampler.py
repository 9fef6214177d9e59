import mmap

import pytest

from mball.bench.sampler import Sampler, beyond_page_cache, status_bytes
from mball.units import MiB

MEMINFO = """MemTotal:       1000 kB
MemFree:         200 kB
MemAvailable:    700 kB
Buffers:          50 kB
Cached:          400 kB
SwapCached:        0 kB
Shmem:            60 kB
SReclaimable:     30 kB
"""


def test_files_do_not_count_and_shared_memory_does() -> None:
    assert beyond_page_cache(MEMINFO) == (1000 - 200 - 50 - 400 + 60 - 30) * 1024
    with pytest.raises(ValueError, match="Shmem"):
        beyond_page_cache(MEMINFO.replace("Shmem", "X"))


def test_a_peak_that_is_gone_at_the_end_is_seen() -> None:
    with Sampler(None) as sampled:
        with mmap.mmap(-1, 64 * MiB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            for at in range(0, 64 * MiB, mmap.PAGESIZE):
                memory[at] = 1
            sampled._stop.wait(0.3)
        after = status_bytes("RssAnon")
    assert sampled.private_bytes >= 60 * MiB
    assert sampled._start[0] + sampled.private_bytes - after >= 60 * MiB
    assert sampled.device_bytes == 0
    assert not sampled._thread.is_alive()


def test_a_field_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="Nothing"):
        status_bytes("Nothing")
