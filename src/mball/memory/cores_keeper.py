"""Gives workers their cores as models come, go, begin to compute and come to rest."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from mball.device import host
from mball.errors import TransitionError
from mball.memory.cores import Cores, Resident, Topology, share
from mball.memory.model import Model
from mball.memory.settings import Settings

_log = structlog.get_logger(__name__)
_PAUSE_S = 0.05
"""Between two changes at least: a burst of requests is one change."""


def topology() -> Topology:
    """Of this machine, as far as this process may use it. Blocks for a moment."""
    quota = host.cpu_quota()
    return Topology(tuple(host.numa_nodes()), None if quota is None else max(1, math.ceil(quota)))


def run_on(pid: int, cpus: tuple[int, ...]) -> None:
    """Lets every thread of a process run there alone; threads that it starts later follow their makers."""
    with contextlib.suppress(OSError):
        for task in (Path("/proc") / str(pid) / "task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cpus)


class CoresKeeper:
    """Of workers that compute on the CPU."""

    def __init__(self, models: Mapping[str, Model], settings: Settings, found: Topology | None = None) -> None:
        self._models = models
        self._settings = settings
        self._topology = found
        self._changed = asyncio.Event()
        self._given: dict[str, tuple[int, Cores]] = {}

    def look(self) -> None:
        """Something may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        if self._topology is None:
            self._topology = await asyncio.to_thread(topology)
        while True:
            self._changed.clear()
            rest_s = await self._step(self._topology)
            await asyncio.sleep(_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await self._changed.wait()

    async def _step(self, found: Topology) -> float | None:
        """Returns in how many seconds one of them may have come to rest; None where nobody computes."""
        now = time.monotonic()
        models = dict(self._models)
        alive = {name: model.worker for name, model in models.items() if model.worker is not None}
        rests = {name: self._rest_s(models[name], now) for name in alive}
        residents = [Resident(name, worker.spec.threads, active=rests[name] > 0) for name, worker in alive.items()]
        wanted = share(found, residents)
        for name, worker in alive.items():
            cores = wanted[name]
            if self._given.get(name) == (worker.pid, cores) or worker.exited.is_set():
                continue
            self._given[name] = (worker.pid, cores)
            await asyncio.to_thread(run_on, worker.pid, cores.cpus)
            try:
                await worker.call("threads", deadline_s=self._settings.verb_s, threads=cores.threads)
            except TransitionError as error:
                _log.debug("threads not set", model=name, error=str(error))
            models[name].cores = cores
        for name in self._given.keys() - alive.keys():
            del self._given[name]
            if name in models:
                models[name].cores = None
        ahead = [rest_s for rest_s in rests.values() if 0 < rest_s < math.inf]
        return min(ahead, default=None)

    def _rest_s(self, model: Model, now: float) -> float:
        """In how many seconds it counts as at rest if nobody asks it."""
        if not model.on_device:
            return 0.0
        if model.queue.in_flight:
            return math.inf
        return max(0.0, model.queue.last_used_s + self._settings.active_s - now)
