"""Recalls figures when the manager starts, and keeps them as they change."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import structlog

from mball.device.device import Device
from mball.memory.estimate import Estimate, estimate, revision, streamed
from mball.memory.figures_store import FiguresStore, Kept
from mball.memory.model import Model
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec

_log = structlog.get_logger(__name__)


class FiguresKeeper:
    """Files are read and written in threads, never on the loop. Without a folder nothing is kept."""

    def __init__(
        self,
        models: Mapping[str, Model],
        devices: Sequence[tuple[Device, int]],
        folder: Path | None,
        settings: Settings,
    ) -> None:
        """`devices`: each with its budget."""
        self._models = models
        self._device = ",".join(device.name for device, _ in devices)
        self._budgets = {device.name: nbytes for device, nbytes in devices}
        self._store = None if folder is None else FiguresStore(folder)
        self._settings = settings
        self._saved: object = None

    async def recall(self, models: Collection[Model]) -> None:
        """Each model's figures as they were, where it has not changed; else a first estimate from its files."""
        await self._stream_the_largest(models)
        specs = {m.name: self._served(m.spec.worker) for m in models}

        def read() -> tuple[dict[str, str], dict[str, Estimate | None], dict[str, Kept]]:
            revisions = {name: revision(spec) for name, spec in specs.items()}
            estimates = {name: estimate(spec) for name, spec in specs.items()}
            return revisions, estimates, {} if self._store is None else self._store.load()

        revisions, estimates, kept = await asyncio.to_thread(read)
        for model in models:
            model.estimate, model.revision = estimates[model.name], revisions[model.name]
            found = kept.get(model.name)
            if found is None:
                continue
            if found.revision != model.revision:
                _log.info("figures forgotten: the model has changed", model=model.name)
                continue
            model.figures = found.figures()
            past_s = max(0.0, time.time() - found.saved_at)
            model.queue.rate.resume(found.rate, time.monotonic() - past_s)
        self._saved = self._saved or self._marks()

    async def _stream_the_largest(self, models: Collection[Model]) -> None:
        """Those that can never fit whole, as their files say: rather slower than refused."""
        most = {m.name: self._most_bytes(m) for m in models}
        specs = {m.name: self._served(m.spec.worker) for m in models}

        def read() -> dict[str, WorkerSpec]:
            whole = {name: estimate(spec) for name, spec in specs.items() if not spec.streamed}
            large = [name for name, found in whole.items() if found is not None and found.total_bytes > most[name]]
            return {name: better for name in large if (better := streamed(specs[name], most[name])) is not None}

        found = await asyncio.to_thread(read)
        for model in models:
            if (spec := found.get(name := model.name)) is None:
                continue
            model.stream(spec)
            _log.warning("streamed: it is larger than its device", model=name, budget_bytes=most[name])

    def _most_bytes(self, model: Model) -> int:
        """The largest budget that it can have."""
        allowed = model.spec.devices
        return max((n for name, n in self._budgets.items() if not allowed or name in allowed), default=0)

    def _served(self, spec: WorkerSpec) -> WorkerSpec:
        # What it may take matters only to one that takes as much as it may.
        most_bytes = max(self._budgets.values(), default=0) if spec.takes_what_it_may else None
        return dataclasses.replace(spec, device=self._device, device_memory_bytes=most_bytes)

    async def run(self) -> None:
        """Until cancelled."""
        while self._store is not None:
            await asyncio.sleep(self._settings.save_s)
            await self.save()

    async def save(self) -> None:
        """Where something has changed since."""
        marks = self._marks()
        if self._store is None or self._saved is None or marks == self._saved:
            return
        now, wall = time.monotonic(), time.time()
        kept = {
            m.name: Kept.of(m.figures, m.revision, m.queue.rate.at(now), wall)
            for m in self._models.values()
            if m.figures.needs is not None or m.queue.rate.at(now) > 0
        }
        if await asyncio.to_thread(self._store.save, kept):
            self._saved = marks

    def _marks(self) -> object:
        """Changes whenever figures do."""
        return [
            (m.counters.starts, m.counters.promotions, m.counters.demotions, m.figures.held.value, m.queue.last_used_s)
            for m in self._models.values()
        ]
