"""Batches as they are kept: what was asked for, and how far it is."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import structlog

from mball.errors import NotFound, StorageLimit
from mball.server.gateway import files_records as records
from mball.server.gateway.files_store import owners
from mball.server.threads import whole

PREFIX = "batch_"
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_STAMPED = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
STATUSES = ("validating", *_STAMPED)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """`output_id` and `error_id` are its files' from the start; clients see them once they are whole, in `published`.

    `stamps` has the second of each status it had. `errors` is why it failed. `usage` are the tokens of
    its answers, once it has ended. `key_name` is whose it is.
    """

    id: str
    key_name: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_id: str
    error_id: str
    output_life_s: int
    metadata: dict[str, str] | None = None
    status: str = "validating"
    stamps: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: dict[str, Any] | None = None
    published: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def to(self, status: str, **changes: Any) -> Batch:
        stamps = {**self.stamps, status: int(time.time())}
        return replace(self, status=status, stamps=stamps, **changes)

    def card(self) -> dict[str, Any]:
        """https://platform.openai.com/docs/api-reference/batch/object"""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": None if self.errors is None else {"object": "list", "data": self.errors},
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_id if self.output_id in self.published else None,
            "error_file_id": self.error_id if self.error_id in self.published else None,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{status}_at": self.stamps.get(status) for status in _STAMPED},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": self.usage,
            "metadata": self.metadata,
        }


class Batches:
    """By owner. What is here is on the disk, but for the counts of one under way."""

    def __init__(self, root: Path, max_batches: int) -> None:
        self._root = root
        self._max_batches = max_batches
        self._batches: dict[str, dict[str, Batch]] = defaultdict(dict)
        self._changing = asyncio.Lock()

    def load(self) -> None:
        """Blocks. Raises StorageFailed."""
        known = {each.name for each in fields(Batch)}
        for owner in owners(self._root):
            for found in records.read(self._root / owner, PREFIX):
                try:
                    batch = Batch(**{name: value for name, value in found.items() if name in known})
                except TypeError as error:
                    _log.warning("a record of no batch", folder=owner, error=str(error))
                    continue
                self._batches[owner][batch.id] = batch

    def unfinished(self) -> Iterator[tuple[str, Batch]]:
        """With their owners, the oldest first."""
        found = [(owner, batch) for owner, its in self._batches.items() for batch in its.values() if not batch.ended]
        return iter(sorted(found, key=lambda each: each[1].created_at))

    def every(self) -> Iterator[Batch]:
        return (batch for its in self._batches.values() for batch in its.values())

    def all(self, owner: str) -> list[Batch]:
        """The newest first."""
        return sorted(self._batches[owner].values(), key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def get(self, owner: str, batch_id: str) -> Batch:
        """Raises NotFound."""
        batch = self._batches[owner].get(batch_id)
        if batch is None:
            raise NotFound(f"no batch {batch_id!r} (see GET /v1/batches)", param="batch_id")
        return batch

    def reading(self, owner: str, file_id: str) -> str | None:
        """The id of a batch under way whose requests are in the file."""
        its = self._batches[owner].values()
        return next((batch.id for batch in its if batch.input_file_id == file_id and not batch.ended), None)

    async def make_room(self, owner: str) -> None:
        """For one more. Raises StorageLimit where as many as may be are under way, StorageFailed."""
        its = self._batches[owner]
        if len(its) < self._max_batches:
            return
        ended = [batch for batch in its.values() if batch.ended]
        if not ended:
            raise StorageLimit(f"{self._max_batches} batches are under way: cancel one, or wait for its end")
        oldest = min(ended, key=lambda batch: batch.created_at)
        await whole(records.remove, self._record(owner, oldest.id))
        its.pop(oldest.id, None)

    async def add(self, owner: str, batch: Batch) -> None:
        """Raises StorageFailed: then it is not there."""
        await whole(records.write, self._record(owner, batch.id), asdict(batch))
        self._batches[owner][batch.id] = batch

    async def change(self, owner: str, batch_id: str, to: Callable[[Batch], Batch]) -> Batch:
        """One change after the other. Raises StorageFailed: then it is as before; NotFound, what `to` raises."""
        async with self._changing:
            batch = to(self.get(owner, batch_id))
            await self.add(owner, batch)
        return batch

    def count(self, owner: str, batch_id: str, *, completed: int, failed: int) -> None:
        """How far it is, for those who ask."""
        its = self._batches[owner]
        its[batch_id] = replace(its[batch_id], completed=completed, failed=failed)

    def _record(self, owner: str, batch_id: str) -> Path:
        return self._root / owner / f"{batch_id}{records.SUFFIX}"
