"""GPUs, by NVML: it makes no CUDA context."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mball.server.doctor.report import Finding
from mball.units import format_bytes


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU. `mig` is None where the GPU cannot be divided; the PCIe link is what it can be, not what it idles at."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    mig: bool | None
    pcie_generation: int | None
    pcie_lanes: int | None


@dataclass(frozen=True, slots=True)
class Driver:
    """What NVML answered; `error` where it did not."""

    version: str = ""
    gpus: tuple[GpuFacts, ...] = ()
    error: str = ""


def read() -> Driver:
    import pynvml  # type: ignore[import-untyped]

    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        with contextlib.suppress(pynvml.NVMLError):
            return question(*arguments)
        return None

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Driver(error=str(error))
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            mode = ask(pynvml.nvmlDeviceGetMigMode, handle)
            gpus.append(
                GpuFacts(
                    index=index,
                    uuid=pynvml.nvmlDeviceGetUUID(handle),
                    name=pynvml.nvmlDeviceGetName(handle),
                    total_bytes=int(memory.total),
                    free_bytes=int(memory.free),
                    mig=None if mode is None else mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
                    pcie_generation=ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
                    pcie_lanes=ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
                )
            )
        return Driver(version=pynvml.nvmlSystemGetDriverVersion(), gpus=tuple(gpus))
    except pynvml.NVMLError as error:
        return Driver(error=str(error))
    finally:
        pynvml.nvmlShutdown()


def findings(driver: Driver) -> list[Finding]:
    if not driver.gpus:
        return [
            Finding(
                "gpu",
                f"none ({driver.error})" if driver.error else "none",
                False,
                "models run on the CPU alone",
                "install NVIDIA's driver; in a container: docker run --gpus all",
                {"error": driver.error},
            )
        ]
    return [_finding(gpu, driver.version) for gpu in driver.gpus]


def _finding(gpu: GpuFacts, version: str) -> Finding:
    link = f", PCIe {gpu.pcie_generation} x{gpu.pcie_lanes}" if gpu.pcie_generation and gpu.pcie_lanes else ""
    free = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
    return Finding(
        f"gpu {gpu.index}",
        f"{gpu.name}, {free}{link}, driver {version}{', MIG on' if gpu.mig else ''}",
        not gpu.mig,
        "the whole GPU cannot be used: it is divided, and memory is not told by process",
        "give MBALL the UUID of one instance (`nvidia-smi -L`), or turn MIG off",
        {**asdict(gpu), "driver_version": version},
    )
