"""A device as the manager sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mball.device import proc
from mball.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Stranger:
    """A process that is not ours, and the device bytes that it holds."""

    pid: int
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Foreign:
    """What others hold of a device. `strangers`: those that the device shows; `hidden_bytes` nobody is seen to hold."""

    strangers: tuple[Stranger, ...] = ()
    hidden_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.hidden_bytes + sum(stranger.nbytes for stranger in self.strangers)


class Device(Protocol):
    """Reads what processes hold. Every method may block for a moment: call it off the event loop.

    Where the device doesn't answer, its methods raise DeviceError.
    """

    @property
    def name(self) -> str:
        """What a worker is told: `cpu`, `cuda:GPU-uuid`, `cuda:MIG-uuid` or `simulated:PATH`; of several that are one,
        theirs with `+` between them."""

    @property
    def total_bytes(self) -> int:
        """What processes can hold of it together."""

    @property
    def context_bytes(self) -> int:
        """What a process holds by being on the device at all, as far as it is known before one has started."""

    def process_bytes(self, pid: int, baseline_bytes: int = 0) -> int | None:
        """Device bytes that the process holds; None where it is gone, or its bytes can't be seen.

        On the CPU, where memory is also the process's own, they are counted above `baseline_bytes`.
        """

    def free_bytes(self) -> int: ...

    def foreign(self, ours: Mapping[int, int]) -> Foreign:
        """What processes hold that are not ours. `ours`: by pid, the bytes that are promised, which count where the
        device does not show what the process holds."""


def open_devices(names: Sequence[str]) -> list[Device]:
    """`cpu`, `cuda` (every GPU that may be seen), `cuda:INDEX`, `cuda:GPU-uuid`, `cuda:MIG-uuid`, or `simulated:PATH`
    where PATH is there. With `+` between them several are one device, for models that are spread over them all:
    `cuda:0+cuda:1`. One that is named twice counts once.

    Raises ConfigError for any other name, DeviceError where there is no such device.
    """
    found = [device for name in names for device in _open(name)]
    return list({device.name: device for device in found}.values())


def open_device(name: str) -> Device:
    """As `open_devices`, of one name; of `cuda` the first GPU."""
    return open_devices([name])[0]


def members(name: str) -> list[str]:
    """The devices that one of this name consists of: itself, where it is no group."""
    return re.split(r"\+(?=cpu|cuda|simulated:)", name)


def _open(name: str) -> Sequence[Device]:
    if len(parts := members(name)) > 1:
        from mball.device.group import DeviceGroup

        found = {device.name: device for part in parts for device in _open(part)}
        if len(found) != len(parts) or any(not each.startswith(("cuda:", "simulated:")) for each in found):
            raise ConfigError(f"{name}: a group has two GPUs or more, each named once by its index or UUID")
        return [DeviceGroup(list(found.values()))]
    kind, _, which = name.partition(":")
    if kind == "cpu" and not which:
        from mball.device.cpu import CpuDevice

        return [CpuDevice()]
    if kind == "simulated" and which:
        from mball.device.simulated import SimulatedDevice

        return [SimulatedDevice.open(which)]
    if kind == "cuda":
        from mball.device.nvml import NvmlDevice

        return [NvmlDevice.find(which)] if which else NvmlDevice.visible()
    raise ConfigError(f"no such device: {name!r} (cpu, cuda, cuda:GPU-uuid or simulated:PATH)")


def strangers(processes: Mapping[int, int], ours: Mapping[int, int]) -> tuple[Stranger, ...]:
    """Those of `processes` (bytes by pid) that live and are neither ours nor in a session that one of ours leads, the
    largest first."""
    found = [
        Stranger(pid, proc.command_name(pid), nbytes)
        for pid, nbytes in processes.items()
        if pid not in ours and (session := proc.session(pid)) is not None and session not in ours
    ]
    return tuple(sorted(found, key=lambda stranger: (-stranger.nbytes, stranger.pid)))
