"""How a worker's process comes to be: its environment, and a fresh start."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mball.device.device import members
from mball.memory.child import Child
from mball.memory.spec import WorkerSpec

_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_SWEEP_S = 10.0

THREADS_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Read when the library of each is loaded, which begins its threads then; no fork keeps those."""


@dataclass(frozen=True, slots=True)
class Birth:
    """What a worker is started with: `channel` is its end of the control channel, `out` its open log."""

    command: Sequence[str]
    spec: WorkerSpec
    environment: Mapping[str, str]
    channel: socket.socket
    log: Path
    out: int


Launch = Callable[[Birth], Awaitable[Child]]
"""Starts a worker's process; raises OSError. `channel` and `out` stay the caller's."""


def base_environment(threads: int) -> dict[str, str]:
    """What every worker, and a zygote, is given: nothing but what it needs."""
    return {
        **{name: os.environ[name] for name in _INHERITED if name in os.environ},
        "CUDA_VISIBLE_DEVICES": "",
        **dict.fromkeys(THREADS_ENVIRONMENT, str(threads)),
        # Threads that spin for long take the cores from the other workers: a step took a second instead of 0.04.
        "GOMP_SPINCOUNT": "10000",
        # Freed memory has to go back to the kernel: a demotion is proven by what the process still holds.
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 20),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def environment(spec: WorkerSpec, extra: Mapping[str, str]) -> dict[str, str]:
    """A worker's whole environment."""
    gpus = [which for kind, _, which in (name.partition(":") for name in members(spec.device)) if kind == "cuda"]
    return {**base_environment(spec.threads), "CUDA_VISIBLE_DEVICES": ",".join(gpus), **_nccl(), **extra}


def _nccl() -> dict[str, str]:
    """How GPUs talk to each other is the host's to say."""
    return {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}


async def fresh(birth: Birth) -> Child:
    """A process of its own from the start."""
    fd = birth.channel.fileno()
    # Spawned by this very thread: the worker's parent-death signal comes when the spawning thread ends.
    popen = subprocess.Popen(  # noqa: ASYNC220
        [*birth.command, "--control-fd", str(fd), "--spec", birth.spec.to_json()],
        stdin=subprocess.DEVNULL,
        stdout=birth.out,
        stderr=birth.out,
        pass_fds=[fd],
        env=birth.environment,
        start_new_session=True,
    )
    return Child(popen.pid, popen.wait, sweep_s=_SWEEP_S)
