"""NVIDIA GPUs as NVML shows them. NVML makes no CUDA context, so the manager and `doctor` may ask it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mball.device import proc
from mball.device.device import Foreign, strangers
from mball.errors import DeviceError
from mball.units import MiB

_BLUR_BYTES = 256 * MiB
"""What the driver keeps beside what it tells of: so much that nobody is seen to hold is nobody's."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG instance of one (`index` is its GPU's then). `total_bytes` without what the driver keeps.

    `processes` maps pid to bytes; empty where a container hides them. `instances`: UUIDs, where MIG is on (else None):
    then the whole GPU can't be used.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    processes: dict[int, int]
    instances: tuple[str, ...] | None = None


def gpus() -> list[Gpu]:
    """All GPUs, each followed by its MIG instances; none where there is no NVIDIA driver.

    Raises DeviceError where the driver answers with an error.
    """
    with _nvml() as nvml:
        if nvml is None:
            return []
        return [gpu for index in range(nvml.nvmlDeviceGetCount()) for gpu in _with_instances(nvml, index)]


class NvmlDevice:
    """One GPU, or one MIG instance, by UUID."""

    context_bytes = 600 * MiB

    def __init__(self, gpu: Gpu) -> None:
        self.uuid = gpu.uuid
        self.total_bytes = gpu.total_bytes

    @classmethod
    def find(cls, which: str) -> NvmlDevice:
        """By UUID, its beginning, or index. Raises DeviceError, also for a GPU that is divided."""
        found = gpus()
        meant = [gpu for gpu in found if _means(which, gpu)]
        if len(meant) != 1:
            said = "several GPUs begin so" if meant else "no such GPU"
            raise DeviceError(f"cuda:{which}: {said}; there are {[gpu.uuid for gpu in meant or found] or 'none'}")
        return cls(_undivided(meant[0]))

    @classmethod
    def visible(cls) -> list[NvmlDevice]:
        """Every GPU, or those that CUDA_VISIBLE_DEVICES names, in its order; of a divided one its instances.

        Raises DeviceError where there is none, or one that is named is not there.
        """
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if named is not None:
            chosen = [cls.find(which.strip()) for which in named.split(",") if which.strip()]
            where = f"in CUDA_VISIBLE_DEVICES={named!r}"
        else:
            chosen = [cls(gpu) for gpu in gpus() if gpu.instances is None]
            where = "here"
        if not chosen:
            raise DeviceError(f"cuda: no GPU {where}")
        return chosen

    @property
    def name(self) -> str:
        return f"cuda:{self.uuid}"

    def process_bytes(self, pid: int, baseline_bytes: int = 0) -> int | None:
        mine = [n for each, n in self._now().processes.items() if each == pid or proc.session(each) == pid]
        return sum(mine) if mine else None

    def free_bytes(self) -> int:
        return self._now().free_bytes

    def foreign(self, ours: Mapping[int, int]) -> Foreign:
        """What is used and neither a stranger's nor ours is hidden: another container's, or a promise outgrown."""
        now = self._now()
        others = strangers(now.processes, ours)
        owners = {pid: pid if pid in ours else proc.session(pid) for pid in now.processes}
        shown_bytes = sum(nbytes for pid, nbytes in now.processes.items() if owners[pid] in ours)
        promised_bytes = sum(nbytes for pid, nbytes in ours.items() if pid not in owners.values())
        used_bytes = now.total_bytes - now.free_bytes
        hidden_bytes = used_bytes - sum(other.nbytes for other in others) - shown_bytes - promised_bytes
        return Foreign(others, hidden_bytes if hidden_bytes > _BLUR_BYTES else 0)

    def _now(self) -> Gpu:
        with _nvml() as nvml:
            if nvml is None:
                raise DeviceError(f"{self.name}: the NVIDIA driver is gone")
            return _read(nvml, nvml.nvmlDeviceGetHandleByUUID(self.uuid), 0)


@contextlib.contextmanager
def _nvml() -> Iterator[ModuleType | None]:
    """NVML; None where the library or the driver is not there. It stays open: opening it takes longer than asking."""
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise DeviceError(f"NVML: {error}") from None


def _undivided(gpu: Gpu) -> Gpu:
    if gpu.instances is not None:
        names = ", ".join(f"cuda:{uuid}" for uuid in gpu.instances) or "it has none yet"
        raise DeviceError(f"cuda:{gpu.uuid} is divided (MIG), so it can't be used whole; name its instances: {names}")
    return gpu


def _means(which: str, gpu: Gpu) -> bool:
    if which.startswith(("GPU-", "MIG-")):
        return gpu.uuid.startswith(which)
    return which == str(gpu.index) and not gpu.uuid.startswith("MIG-")


def _with_instances(nvml: ModuleType, index: int) -> list[Gpu]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    if not _is_divided(nvml, handle):
        return [_read(nvml, handle, index)]
    instances = [_read(nvml, instance, index) for instance in _instances(nvml, handle)]
    return [_read(nvml, handle, index, tuple(gpu.uuid for gpu in instances)), *instances]


def _is_divided(nvml: ModuleType, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # it can't be
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _instances(nvml: ModuleType, handle: Any) -> Iterator[Any]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError):  # a place that no instance takes
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)


def _read(nvml: ModuleType, handle: Any, index: int, instances: tuple[str, ...] | None = None) -> Gpu:
    total_bytes, free_bytes = _memory(nvml, handle)
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        processes=_processes(nvml, handle),
        instances=instances,
    )


def _memory(nvml: ModuleType, handle: Any) -> tuple[int, int]:
    """(total, free), where the driver tells it without what it keeps for itself."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.total), int(memory.free)
    return int(memory.total - memory.reserved), int(memory.free)


def _processes(nvml: ModuleType, handle: Any) -> dict[int, int]:
    """Bytes by pid, of those that compute and those that draw."""
    running = list(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    with contextlib.suppress(nvml.NVMLError):  # an instance draws nothing
        running += nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    # usedGpuMemory is None where the driver can't attribute memory.
    return {process.pid: int(process.usedGpuMemory) for process in running if process.usedGpuMemory is not None}
