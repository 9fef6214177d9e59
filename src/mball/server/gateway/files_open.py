"""What a server keeps on a disk for its clients, files and batches: opened with it, and closed before its models."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from mball.errors import StorageFailed
from mball.server.config import FilesConfig
from mball.server.gateway.batches_ask import Gateway
from mball.server.gateway.batches_run import Runner
from mball.server.gateway.batches_store import Batches
from mball.server.gateway.files_store import Files, lock
from mball.server.threads import whole

_log = structlog.get_logger(__name__)


class Storage:
    """Where the folder can't be had, the server serves without: who asks for files is told why."""

    def __init__(self, root: Path | None, limits: FilesConfig, gateway: Gateway, *, upload_timeout_s: float) -> None:
        """`root`: None where there is no folder of state."""
        self._root = root
        self._why: str | None = "the server is starting"
        self._lock: int | None = None
        self.max_file_bytes = limits.max_file_bytes
        self.upload_timeout_s = upload_timeout_s
        self.files = Files(root or Path(), limits)
        self.batches = Batches(root or Path(), limits.max_batches)
        self.runner = Runner(
            self.files, self.batches, gateway, max_requests=limits.max_requests, concurrency=limits.concurrency
        )

    async def check(self) -> None:
        """Raises StorageFailed where nothing is kept here."""
        if self._why is not None:
            raise StorageFailed(f"no files and batches: {self._why}")

    async def open(self) -> None:
        """What was under way when the last server ended goes on."""
        try:
            if self._root is None:
                raise StorageFailed("there is no folder for them: set `files: {path: …}`")
            self._lock = await whole(lock, self._root)
            await whole(self._load)
            await self.sweep()
        except StorageFailed as error:
            self._why = str(error)
            _log.warning("no files and batches", reason=self._why)
            return
        self._why = None
        for _, batch in self.batches.unfinished():
            self.runner.begin(batch)

    async def sweep(self) -> None:
        """Deletes files that have expired and that no batch reads. Raises StorageFailed."""
        await self.files.sweep(lambda owner, file_id: self.batches.reading(owner, file_id) is not None)

    def _load(self) -> None:
        self.batches.load()
        self.files.load({name for _, batch in self.batches.unfinished() for name in (batch.output_id, batch.error_id)})

    async def close(self) -> None:
        await self.runner.close()
        self._why = "the server is shutting down"
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
