"""A store's file found, made or refused, and locked. Nothing that is not ours is written to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mball.errors import SwapForeign, SwapInUse, SwapUnavailable
from mball.swap.disk import Disk, aligned, reopened, sync_folder
from mball.swap.layout import BLOCK_BYTES, HOLDER_AT, MAGIC, SUPERBLOCKS, Damaged, Layout, Superblock
from mball.units import MiB, format_bytes

OpenDisk = Callable[..., Disk]

_LOOKED_AT_BYTES = 1 * MiB
"""Of a block device, to be called blank."""


@dataclass(frozen=True, slots=True)
class Opened:
    """`lock_fd` holds the lock until it is closed. `remade` says why the contents of a store of ours were given up."""

    path: Path
    disk: Disk
    superblock: Superblock
    lock_fd: int
    remade: str | None = None

    def close(self) -> None:
        self.disk.close()
        os.close(self.lock_fd)


def acquire(
    path: Path,
    *,
    size_bytes: int | None = None,
    slot_bytes: int | None = None,
    open_disk: OpenDisk = reopened,
    fresh: bool = False,
) -> Opened:
    """The store at `path`, locked. Without `size_bytes` it must be there; with it, it is made where it is not, and made
    anew where it is ours and of another size, version or layout, or damaged; or `fresh` is wanted.

    Raises SwapInUse, SwapForeign, SwapUnavailable, ConfigError.
    """
    lock_fd, writable, created = _open(path, create=size_bytes is not None)
    disk: Disk | None = None
    try:
        _lock(lock_fd, path)
        with _explained(path):
            disk = open_disk(lock_fd, writable=writable)
            opened = _identified(path, lock_fd, disk, size_bytes, slot_bytes, fresh)
            if opened is None:
                opened = _made_at(path, lock_fd, disk, size_bytes or 0, slot_bytes, created)
            if writable:
                _prepare(opened)
        return opened
    except BaseException:
        if disk is not None:
            disk.close()
        os.close(lock_fd)
        raise


def anonymous(folder: Path, *, size_bytes: int, slot_bytes: int, open_disk: OpenDisk = reopened) -> Opened:
    """A new store on the folder's file system that has no name: it ends with those who have it open.

    Raises SwapUnavailable, ConfigError.
    """
    with _explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = _nameless(folder)
        disk: Disk | None = None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            disk = open_disk(fd, writable=True)
            superblock = make(disk, Layout.of_size(size_bytes, slot_bytes))
            return Opened(folder, disk, superblock, fd)
        except BaseException:
            if disk is not None:
                disk.close()
            os.close(fd)
            raise


def make(disk: Disk, layout: Layout) -> Superblock:
    """A new, empty store in an open file. Until the end the superblock says that it is being made. Raises OSError."""
    superblock = Superblock(layout, secrets.token_bytes(16), time.time())
    _write_superblock(disk, superblock, ready=False)
    disk.sync()
    if not disk.is_block_device:
        _check_space(disk, layout.total_bytes)
        disk.truncate(layout.total_bytes)
        disk.allocate(layout.total_bytes)
    nothing = aligned(BLOCK_BYTES)
    for area in range(2):
        disk.write([nothing], layout.index_at(area))
    disk.sync()
    _write_superblock(disk, superblock, ready=True)
    disk.sync()
    return superblock


def read_superblock(disk: Disk) -> Superblock | None:
    """None where what is there is not ours. Raises Damaged where it is, and can't be used; OSError."""
    why: Damaged | None = None
    for number in range(SUPERBLOCKS):
        block = aligned(BLOCK_BYTES)
        # Of a file that ends before, what there is.
        disk.preadv([block], number * BLOCK_BYTES)
        if block[: len(MAGIC)] != MAGIC:
            continue
        try:
            return Superblock.decode(bytes(block))
        except Damaged as error:
            why = why or error
    if why is not None:
        raise why
    return None


def holder(fd: int) -> str:
    """Who has the store, as it said."""
    try:
        said = json.loads(os.pread(fd, BLOCK_BYTES, HOLDER_AT).rstrip(b"\0"))
        pid, command, since = int(said["pid"]), str(said["command"]), str(said["since"])
    except (ValueError, KeyError, TypeError, OSError):
        return "who does not say its name"
    return f"pid {pid}: " + "".join(c if c.isprintable() else "?" for c in f"{command}, since {since}")


def _open(path: Path, *, create: bool) -> tuple[int, bool, bool]:
    """A descriptor, whether it may be written to, whether the file was not there before."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    tries = [(os.O_RDWR, True, False)]
    if create:
        tries.append((os.O_RDWR | os.O_CREAT | os.O_EXCL, True, True))
    tries.append((os.O_RDONLY, False, False))
    failed: OSError | None = None
    for mode, writable, created in tries:
        try:
            if created:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # On a block device O_EXCL keeps those away who would mount it; it is refused where one has.
            exclusive = os.O_EXCL if writable and path.is_block_device() else 0
            fd = os.open(path, mode | exclusive | flags, 0o600)
        except OSError as error:
            if failed is None or error.errno not in (errno.ENOENT, errno.EEXIST):
                failed = error
            if error.errno in (errno.EBUSY, errno.ENOSPC, errno.EISDIR):
                break
            continue
        if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
            os.close(fd)
            raise SwapForeign(f"swap: {path} is no file and no block device: name another path")
        return fd, writable, created
    number = failed.errno if failed is not None else errno.ENOENT
    if number == errno.ENOENT:
        raise SwapUnavailable(f"swap: {path} is not there: make it with `mball swap init {path} --size …`") from failed
    if number == errno.EBUSY:
        raise SwapInUse(f"swap: {path} is mounted, or another program has it: unmount it, or name another path")
    raise SwapUnavailable(f"swap: {path} can't be opened: {os.strerror(number or errno.EIO)}") from failed


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SwapInUse(
            f"swap: {path} is in use by another MBALL ({holder(fd)}): stop it, or name another path"
        ) from None


def _identified(
    path: Path, lock_fd: int, disk: Disk, size_bytes: int | None, slot_bytes: int | None, fresh: bool
) -> Opened | None:
    """The store that is there; None where one is to be made, and may be."""
    why = "a fresh one is wanted"
    try:
        superblock = read_superblock(disk)
        if superblock is None and not (size_bytes is not None and _is_blank(disk)):
            raise SwapForeign(
                f"swap: {path} holds something that is not MBALL's, and is left as it is: name another path, or, if "
                f"nothing in it is wanted, {_way_out(path, disk)}"
            )
        if superblock is None:
            return None
        if disk.nbytes < superblock.layout.total_bytes:
            raise Damaged(f"{disk.nbytes} bytes are there of {superblock.layout.total_bytes}")
        if size_bytes is None or not fresh:
            wanted = _wanted(disk, size_bytes, slot_bytes or superblock.layout.slot_bytes)
            if wanted in (None, superblock.layout):
                return Opened(path, disk, superblock, lock_fd)
            why = f"another size or slot size is wanted: {format_bytes(size_bytes or 0)}"
    except Damaged as error:
        why = str(error)
        if size_bytes is None:
            raise SwapUnavailable(
                f"swap: {path} is MBALL's, but can't be used ({why}): make it anew with `mball swap init`"
            ) from None
    if not disk.writable:
        raise SwapUnavailable(f"swap: {path} can't be written to, and has to be made anew ({why})")
    wanted = _wanted(disk, size_bytes, slot_bytes)
    return Opened(path, disk, make(disk, wanted or Layout.of_size(size_bytes or 0)), lock_fd, why)


def _made_at(path: Path, lock_fd: int, disk: Disk, size_bytes: int, slot_bytes: int | None, created: bool) -> Opened:
    if not disk.writable:
        raise SwapUnavailable(f"swap: {path} can't be written to")
    try:
        layout = _wanted(disk, size_bytes, slot_bytes) or Layout.of_size(size_bytes)
        superblock = make(disk, layout)
        sync_folder(path)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return Opened(path, disk, superblock, lock_fd)


def _wanted(disk: Disk, size_bytes: int | None, slot_bytes: int | None) -> Layout | None:
    if size_bytes is None:
        return None
    most = min(size_bytes, disk.nbytes) if disk.is_block_device else size_bytes
    return Layout.of_size(most, slot_bytes) if slot_bytes is not None else Layout.of_size(most)


def _prepare(opened: Opened) -> None:
    disk = opened.disk
    if not disk.is_block_device:
        # Whatever copied or backed it up meanwhile: no reader but its owner, and no holes.
        os.fchmod(opened.lock_fd, 0o600)
        if disk.allocated_bytes < opened.superblock.layout.total_bytes:
            disk.allocate(opened.superblock.layout.total_bytes)
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    said = {"pid": os.getpid(), "command": " ".join(sys.argv)[:1024], "since": since}
    block = aligned(BLOCK_BYTES)
    text = json.dumps(said).encode()[:BLOCK_BYTES]
    block[: len(text)] = text
    disk.write([block], HOLDER_AT)


def _check_space(disk: Disk, nbytes: int) -> None:
    """Better said before than found out when the disk is full."""
    system = os.fstatvfs(disk.fd)
    free_bytes = system.f_bavail * system.f_frsize
    more_bytes = nbytes - disk.allocated_bytes
    if more_bytes > free_bytes:
        raise SwapUnavailable(
            f"swap: {format_bytes(more_bytes)} wanted on the disk, {format_bytes(free_bytes)} free: give it less, or "
            "another disk"
        )


def _is_blank(disk: Disk) -> bool:
    if not disk.is_block_device and disk.nbytes > SUPERBLOCKS * BLOCK_BYTES:
        return False
    # A file so short has nothing in it but a beginning that was never written, or was cut off.
    nbytes = min(disk.nbytes, _LOOKED_AT_BYTES)
    looked_at = os.pread(disk.fd, nbytes, 0) if not disk.direct else _read_whole(disk, nbytes)
    return not any(looked_at)


def _read_whole(disk: Disk, nbytes: int) -> bytes:
    memory = aligned(-(-nbytes // BLOCK_BYTES) * BLOCK_BYTES)
    return bytes(memory[: disk.preadv([memory], 0)]) if nbytes else b""


def _way_out(path: Path, disk: Disk) -> str:
    return f"clear it (`blkdiscard -z {path}`)" if disk.is_block_device else f"remove it (`rm {path}`)"


def _write_superblock(disk: Disk, superblock: Superblock, *, ready: bool) -> None:
    """Both copies. One is whole at any time."""
    block = aligned(BLOCK_BYTES)
    block[:] = superblock.encode(ready=ready)
    for number in range(SUPERBLOCKS):
        disk.write([block], number * BLOCK_BYTES)


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    path = folder / f".mball-swap-{secrets.token_hex(8)}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = ": give it less, or another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise SwapUnavailable(f"swap: {path}: {os.strerror(error.errno or errno.EIO)}{hint}") from error
