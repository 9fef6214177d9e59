"""Files that clients handed in, and those of answers: each belongs to one API key."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from mball.errors import NotFound, StorageFailed, StorageLimit
from mball.server import tenants
from mball.server.batch.answers import sync_folder
from mball.server.config import FilesConfig
from mball.server.gateway import files_records as records
from mball.server.threads import whole
from mball.units import format_bytes

PREFIX = "file-"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class File:
    """`expires_at`: from then on it is not there."""

    id: str
    filename: str
    purpose: str
    created_at: int
    bytes: int
    expires_at: int | None = None

    def card(self) -> dict[str, Any]:
        """https://platform.openai.com/docs/api-reference/files/object"""
        return {**asdict(self), "object": "file", "status": "processed", "status_details": None}


@dataclass(eq=False, slots=True)
class Incoming:
    """Bytes that come in, and count before they are a file."""

    nbytes: int = 0


class Files:
    """Owners are names of folders. Everything is on the disk before it is here."""

    def __init__(self, root: Path, limits: FilesConfig) -> None:
        self.root = root
        self._limits = limits
        self._files: dict[str, dict[str, File]] = defaultdict(dict)
        self._incoming: dict[str, set[Incoming]] = defaultdict(set)

    def load(self, unfinished: set[str]) -> None:
        """Reads what is there and removes what an upload or a deletion left half; the data of `unfinished` ids has no
        record yet. Blocks. Raises StorageFailed."""
        for owner in owners(self.root):
            folder = self.root / owner
            found: dict[str, File] = {}
            for fields in records.read(folder, PREFIX):
                try:
                    file = File(**fields)
                except TypeError as error:
                    _log.warning("a record of no file", folder=str(folder), error=str(error))
                    continue
                found[file.id] = file
            self._files[owner] = found
            wanted = {*found, *unfinished}
            for path in folder.iterdir():
                half = path.suffix == records.PART
                if half or (path.suffix == ".jsonl" and path.stem not in wanted):
                    records.remove(path)

    def all(self, owner: str) -> list[File]:
        """The newest first."""
        now = time.time()
        files = [file for file in self._files[owner].values() if file.expires_at is None or file.expires_at > now]
        return sorted(files, key=lambda file: (file.created_at, file.id), reverse=True)

    def get(self, owner: str, file_id: str) -> File:
        """Raises NotFound."""
        file = self._files[owner].get(file_id)
        if file is None or (file.expires_at is not None and file.expires_at <= time.time()):
            raise NotFound(f"no file {file_id!r} (see GET /v1/files)", param="file_id")
        return file

    def path(self, owner: str, file_id: str) -> Path:
        return self.root / owner / f"{file_id}.jsonl"

    @contextlib.contextmanager
    def incoming(self, owner: str) -> Iterator[Incoming]:
        """For what comes in to count."""
        incoming = Incoming()
        self._incoming[owner].add(incoming)
        try:
            yield incoming
        finally:
            self._incoming[owner].discard(incoming)

    def check_bytes(self, owner: str) -> None:
        """Raises StorageLimit where the owner's files, with what comes in, are larger than they may be."""
        files, incoming = self._files[owner].values(), self._incoming[owner]
        if sum(file.bytes for file in files) + sum(each.nbytes for each in incoming) > self._limits.max_bytes:
            raise StorageLimit(f"the files would take over {format_bytes(self._limits.max_bytes)}: delete some")

    def check_count(self, owner: str) -> None:
        """Raises StorageLimit where the owner has as many files as it may, those that come in included."""
        if len(self._files[owner]) + len(self._incoming[owner]) > self._limits.max_files:
            raise StorageLimit(f"there would be more than {self._limits.max_files} files: delete some")

    async def open_folder(self, owner: str) -> Path:
        """Raises StorageFailed."""
        folder = self.root / owner
        await whole(_make, folder)
        return folder

    async def add(self, owner: str, file: File) -> None:
        """Once its data is on the disk, at `path`. Raises StorageFailed."""
        await whole(records.write, self._record(owner, file.id), asdict(file))
        self._files[owner][file.id] = file

    async def delete(self, owner: str, file_id: str) -> None:
        """Also one that is not there. Raises StorageFailed."""
        await whole(records.remove, self._record(owner, file_id), self.path(owner, file_id))
        self._files[owner].pop(file_id, None)

    async def sweep(self, used: Callable[[str, str], bool]) -> None:
        """Deletes what has expired, but for what `used` says of an owner's file. Raises StorageFailed."""
        now = time.time()
        for owner, files in list(self._files.items()):
            for file in list(files.values()):
                if file.expires_at is not None and file.expires_at <= now and not used(owner, file.id):
                    await self.delete(owner, file.id)

    def _record(self, owner: str, file_id: str) -> Path:
        return self.root / owner / f"{file_id}{records.SUFFIX}"


def new_id(prefix: str = PREFIX) -> str:
    return prefix + secrets.token_hex(12)


def owner_of(key_name: str) -> str:
    """The folder of a key's files; where there are no keys, everybody's."""
    return tenants.tenant(key_name) or "everybody"


def owners(root: Path) -> list[str]:
    """Those who have a folder. Raises StorageFailed."""
    try:
        return [path.name for path in root.iterdir() if path.is_dir()]
    except OSError as error:
        raise records.failed(root, error) from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise records.failed(folder, error) from None


def lock(root: Path) -> int:
    """Makes the folder and locks it for this process, as long as the descriptor is open. Blocks. Raises
    StorageFailed."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise records.failed(root, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StorageFailed(f"{root} is another server's: give this one a folder of its own (files: path)") from None
    return descriptor
