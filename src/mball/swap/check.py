"""A store looked at while nobody serves from it: nothing is written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mball.errors import SwapForeign, SwapInUse, SwapMiss, SwapUnavailable
from mball.swap.disk import Disk, aligned, reopened
from mball.swap.index import Entry, Kind, Snapshot
from mball.swap.layout import BLOCK_BYTES, SUPERBLOCKS, Damaged, Superblock
from mball.swap.opening import holder, read_superblock
from mball.swap.slots import Slots
from mball.swap.snapshots import Snapshots

Progress = Callable[[int, int], object]
"""Called with the slots read and the slots in all."""


@dataclass(frozen=True, slots=True)
class BadSlot:
    """What is wrong with one slot of an entry."""

    kind: Kind
    key: bytes
    reason: str
    message: str


@dataclass(slots=True)
class Found:
    """What is at a path. `superblocks` and `indexes` say `good`, or what is wrong, of each copy."""

    superblock: Superblock
    direct: bool
    held_by: str | None
    superblocks: list[str]
    indexes: list[str]
    snapshot: Snapshot | None
    entries_good: int = 0
    slots_checked: int = 0
    bad: list[BadSlot] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged: a copy that was never written is none."""
        return not self.bad and all(copy.startswith(("good", "never")) for copy in (*self.superblocks, *self.indexes))

    def entries(self, kind: Kind) -> list[Entry]:
        return [entry for entry in self.snapshot.entries if entry.kind is kind] if self.snapshot else []


def look(path: Path) -> Found:
    """What the superblock and the newest index say; works while a manager has it, and then says who.

    Raises SwapForeign, SwapUnavailable.
    """
    fd = _open(path)
    try:
        held_by = None if _locked(fd) else holder(fd)
        disk = _disk(fd, path)
        try:
            return _found(path, disk, held_by)
        finally:
            disk.close()
    finally:
        os.close(fd)


def check(path: Path, progress: Progress = lambda done, total: None) -> Found:
    """As `look`, and every slot of every entry is read and verified. Raises SwapInUse where a manager has it, too."""
    fd = _open(path)
    try:
        if not _locked(fd):
            raise SwapInUse(f"swap: {path} is in use by another MBALL ({holder(fd)}): stop it first")
        disk = _disk(fd, path)
        try:
            found = _found(path, disk, None)
            _verify(found, disk, progress)
            return found
        finally:
            disk.close()
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SwapUnavailable(f"swap: {path} can't be opened: {error.strerror}") from error


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _disk(fd: int, path: Path) -> Disk:
    try:
        return reopened(fd, writable=False)
    except OSError as error:
        raise SwapUnavailable(f"swap: {path} can't be opened: {error.strerror}") from error


def _found(path: Path, disk: Disk, held_by: str | None) -> Found:
    try:
        superblock = read_superblock(disk)
        if superblock is None:
            raise SwapForeign(f"swap: {path} is no store of MBALL's")
        if disk.nbytes < superblock.layout.total_bytes:
            raise Damaged(f"{disk.nbytes} bytes are there of {superblock.layout.total_bytes}")
        copies = [_copy(disk, number) for number in range(SUPERBLOCKS)]
    except Damaged as error:
        raise SwapUnavailable(f"swap: {path} is MBALL's, but can't be used: {error}") from None
    except OSError as error:
        raise SwapUnavailable(f"swap: {path} can't be read: {error.strerror}") from error
    snapshots = Snapshots(disk, superblock)
    indexes: list[str] = []
    newest: Snapshot | None = None
    for area in range(2):
        try:
            snapshot = snapshots.read(area)
        except Damaged as error:
            indexes.append(str(error))
            continue
        indexes.append(f"good, generation {snapshot.generation}, {len(snapshot.entries)} entries")
        newest = snapshot if newest is None or snapshot.generation > newest.generation else newest
    return Found(superblock, disk.direct, held_by, copies, indexes, newest)


def _copy(disk: Disk, number: int) -> str:
    block = aligned(BLOCK_BYTES)
    disk.read([block], number * BLOCK_BYTES)
    try:
        Superblock.decode(bytes(block))
    except Damaged as error:
        return str(error)
    return "good"


def _verify(found: Found, disk: Disk, progress: Progress) -> None:
    layout = found.superblock.layout
    slots = Slots(disk, layout, found.superblock.store_id)
    entries = list(found.snapshot.entries) if found.snapshot else []
    total = sum(entry.place.slots for entry in entries)
    memory = aligned(slots.slots_a_call * layout.slot_bytes)
    for entry in entries:
        place, good = entry.place, True
        for run in place.runs(0, place.slots, 1):
            try:
                into = memory[: place.payload_bytes(run.ordinal, layout)]
                slots.read_run(place, run, into, run.ordinal * layout.slot_bytes)
            except SwapMiss as miss:
                good = False
                found.bad.append(BadSlot(entry.kind, place.key, miss.reason, str(miss)))
            found.slots_checked += 1
            progress(found.slots_checked, total)
        found.entries_good += good
