"""How much memory a call takes at its peak, by a thread that looks often."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_PERIOD_S = 0.01
_JOIN_S = 5.0


class Sampler:
    """Peaks above the start, while the block runs.

    `private_bytes` of this process's anonymous memory; `host_bytes` of the whole machine's memory beyond its page
    cache, which counts memory that a driver pinned, too (nothing else should run); `device_bytes` of the GPU's.
    """

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mball-sampler", daemon=True)
        self._start = (0, 0, 0)
        self._peak = (0, 0, 0)

    @property
    def private_bytes(self) -> int:
        return self._peak[0] - self._start[0]

    @property
    def host_bytes(self) -> int:
        return self._peak[1] - self._start[1]

    @property
    def device_bytes(self) -> int:
        return self._peak[2] - self._start[2]

    def __enter__(self) -> Self:
        self._start = self._peak = self._now()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S)
        self._look()

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self._look()

    def _look(self) -> None:
        private, host, device = (max(pair) for pair in zip(self._peak, self._now(), strict=True))
        self._peak = (private, host, device)

    def _now(self) -> tuple[int, int, int]:
        device_bytes = 0
        if self._device is not None:
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            device_bytes = total_bytes - free_bytes
        return status_bytes("RssAnon"), beyond_page_cache(Path("/proc/meminfo").read_text()), device_bytes


def status_bytes(field: str) -> int:
    """A field of /proc/self/status. Raises ValueError where there is none."""
    return _fields(Path("/proc/self/status").read_text(), field)[field]


def beyond_page_cache(meminfo: str) -> int:
    """Bytes in use that the kernel can't take back from files: shared memory counts, cached files don't."""
    wanted = ("MemTotal", "MemFree", "Buffers", "Cached", "SReclaimable", "Shmem")
    found = _fields(meminfo, *wanted)
    cache = found["Buffers"] + found["Cached"] - found["Shmem"] + found["SReclaimable"]
    return found["MemTotal"] - found["MemFree"] - cache


def _fields(text: str, *names: str) -> dict[str, int]:
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            found[name] = int(rest.split()[0]) * 1024
    missing = set(names) - set(found)
    if missing:
        raise ValueError(f"the kernel does not say {', '.join(sorted(missing))}")
    return found
