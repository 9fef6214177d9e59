"""A device as the manager sees it."""

from __future__ import annotations

from typing import Protocol

from mball.errors import ConfigError


class Device(Protocol):
    """Reads what processes hold. Every method may block for a moment: call it off the event loop."""

    @property
    def name(self) -> str:
        """What a worker is told: `cpu`, `cuda:GPU-uuid` or `simulated:PATH`."""

    @property
    def total_bytes(self) -> int: ...

    @property
    def context_bytes(self) -> int:
        """What a process holds by being on the device at all, as far as it is known before one has started."""

    def process_bytes(self, pid: int, baseline_bytes: int = 0) -> int | None:
        """Device bytes that the process holds; None where it is gone, or its bytes can't be seen.

        On the CPU, where memory is also the process's own, they are counted above `baseline_bytes`.
        """

    def free_bytes(self) -> int: ...


def open_device(name: str) -> Device:
    """`cpu`, `cuda` (the first GPU), `cuda:INDEX`, `cuda:GPU-uuid`, or `simulated:PATH` where PATH is there.

    Raises ConfigError for any other name, DeviceError where there is no such device.
    """
    kind, _, which = name.partition(":")
    if kind == "cpu" and not which:
        from mball.device.cpu import CpuDevice

        return CpuDevice()
    if kind == "simulated" and which:
        from mball.device.simulated import SimulatedDevice

        return SimulatedDevice.open(which)
    if kind == "cuda":
        from mball.device.nvml import NvmlDevice

        return NvmlDevice.find(which or "0")
    raise ConfigError(f"no such device: {name!r} (cpu, cuda, cuda:GPU-uuid or simulated:PATH)")
