"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil
import pynvml  # type: ignore[import-untyped]

import mball
from mball.units import format_bytes

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SHARED_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def describe(device: str = "cpu") -> dict[str, str]:
    """The machine in words, and how busy it is; nothing that names its owner or host."""
    return {
        **(_gpu(device) if device != "cpu" else {}),
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory": format_bytes(psutil.virtual_memory().total),
        "kernel": platform.release(),
        "transparent huge pages": _chosen(_HUGE_PAGES),
        "the same for images": _chosen(_SHARED_HUGE_PAGES),
        "python": platform.python_version(),
        "load average before": f"{os.getloadavg()[0]:.1f}",
    }


def _gpu(device: str) -> dict[str, str]:
    """By NVML, which makes no context. Nothing where it is not there."""
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
            generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
            width = pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
            return {
                "gpu": f"{pynvml.nvmlDeviceGetName(handle)}, PCIe {generation} × {width}",
                "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            }
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return {"gpu": f"NVML does not say: {error}"}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """MBALL's version, and those of the packages that are installed."""
    found = {"mball": mball.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def huge_images() -> bool:
    """Whether a DRAM image made now is in huge pages."""
    return _chosen(_SHARED_HUGE_PAGES) in ("always", "within_size", "advise", "force")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _chosen(path: Path) -> str:
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"
