"""The CPU as a device: its memory is the private memory of the processes that compute on it."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from mball.device import proc
from mball.device.device import Foreign


class CpuDevice:
    """Counts private dirty memory of a worker and its children above its idle baseline; images and libraries don't
    count."""

    name = "cpu"
    context_bytes = 0

    def __init__(self) -> None:
        self.total_bytes: int = psutil.virtual_memory().total

    def process_bytes(self, pid: int, baseline_bytes: int = 0) -> int | None:
        held = proc.family_private_bytes(pid)
        return None if held is None else max(0, held - baseline_bytes)

    def free_bytes(self) -> int:
        """What the kernel says can be had without swapping."""
        return int(psutil.virtual_memory().available)

    def foreign(self, ours: Mapping[int, int]) -> Foreign:
        """None: what others leave of host memory is the pressure watch's to see."""
        return Foreign()
