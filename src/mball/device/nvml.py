"""NVIDIA GPUs as NVML shows them. NVML makes no CUDA context, so the manager and `doctor` may ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from mball.errors import DeviceError
from mball.units import MiB


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `processes` maps pid to bytes; empty where a container hides them."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    processes: dict[int, int]


def gpus() -> list[Gpu]:
    """All GPUs; none where there is no NVIDIA driver. Raises DeviceError where the driver answers with an error."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        return [_read(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]


class NvmlDevice:
    """One GPU, by UUID."""

    context_bytes = 600 * MiB

    def __init__(self, gpu: Gpu) -> None:
        self.uuid = gpu.uuid
        self.total_bytes = gpu.total_bytes

    @classmethod
    def find(cls, which: str) -> NvmlDevice:
        """By UUID or index. Raises DeviceError."""
        found = gpus()
        for gpu in found:
            if which in (gpu.uuid, str(gpu.index)):
                return cls(gpu)
        raise DeviceError(f"cuda:{which}: no such GPU; there are {[gpu.uuid for gpu in found] or 'none'}")

    @property
    def name(self) -> str:
        return f"cuda:{self.uuid}"

    def process_bytes(self, pid: int, baseline_bytes: int = 0) -> int | None:
        return self._now().processes.get(pid)

    def free_bytes(self) -> int:
        return self._now().free_bytes

    def _now(self) -> Gpu:
        with _nvml() as nvml:
            if nvml is None:
                raise DeviceError(f"{self.name}: the NVIDIA driver is gone")
            handle = nvml.nvmlDeviceGetHandleByUUID(self.uuid)
            return _read(nvml, nvml.nvmlDeviceGetIndex(handle))


@contextlib.contextmanager
def _nvml() -> Iterator[ModuleType | None]:
    """NVML between init and shutdown; None where the library or the driver is not there."""
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
    finally:
        pynvml.nvmlShutdown()


def _read(nvml: ModuleType, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        # usedGpuMemory is None where the driver can't attribute memory (MIG, some containers).
        processes={p.pid: int(p.usedGpuMemory) for p in running if p.usedGpuMemory is not None},
    )
