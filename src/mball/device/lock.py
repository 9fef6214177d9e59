"""One daemon for each device: an advisory lock that ends with its holder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import time
from datetime import datetime
from pathlib import Path

from mball.errors import DeviceError, DeviceInUse

FOLDERS = (Path("/run/lock"), Path("/tmp"))
"""Where locks of GPUs lie, the first that is there: all users have to look at the same place."""
_HOLDER_BYTES = 4096
_POLL_S = (0.001, 0.05)


class DeviceLock:
    """Held until `release`, or the end of the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        """Idempotent. The file stays: one that goes could be locked by two."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lock_device(name: str, runtime_dir: Path) -> DeviceLock:
    """Locks `cuda:GPU-uuid` on the whole machine, `simulated:PATH` beside PATH, `cpu` in the daemon's own folder.

    The CPU is everyone's: what daemons hold of it is bounded by their budgets, and only two of one folder get into
    each other's way. Raises DeviceInUse, which says who holds it, and DeviceError where the file is not to be trusted.
    """
    path = _path(name, runtime_dir)
    fd = _open(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(fd)
        os.close(fd)
        way_out = "name another runtime_dir" if name == "cpu" else "give this one another device"
        raise DeviceInUse(f"{name} is managed by another MBALL ({holder}; {path}): stop it, or {way_out}") from None
    with contextlib.suppress(OSError):  # a lock of another user's file is a lock, but says no name
        _sign(fd)
    return DeviceLock(fd)


def lock_within(fd: int, wait_s: float) -> bool:
    """Whether a file could be locked within so many seconds. flock has no deadline of its own: it is tried again, soon
    at first."""
    deadline, (pause_s, most_s) = time.monotonic() + wait_s, _POLL_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, most_s)


def _path(name: str, runtime_dir: Path) -> Path:
    kind, _, which = name.partition(":")
    if kind == "cuda":
        folder = next((folder for folder in FOLDERS if os.access(folder, os.W_OK | os.X_OK)), FOLDERS[-1])
        return folder / f"mball-{''.join(c if c.isalnum() or c == '-' else '_' for c in which)}.lock"
    return Path(f"{which}.daemon") if kind == "simulated" else runtime_dir / "daemon.lock"


def _open(path: Path) -> int:
    """Anybody may have put anything there: only a plain file of one name is opened, and no link is followed."""
    plain = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = -1
    # Not O_CREAT where it is there: the kernel refuses that for another user's file in a folder of everyone's.
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_RDWR, os.O_RDONLY):
        try:
            fd = os.open(path, flags | plain, 0o666)
        except OSError as error:
            failed = error
            continue
        if flags & os.O_CREAT:
            os.fchmod(fd, 0o666)
        break
    if fd < 0:
        raise DeviceError(f"{path}: {failed.strerror}: the lock of the device can't be opened; remove what is there")
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(fd)
        raise DeviceError(f"{path} is no plain file of one name: remove it")
    return fd


def _sign(fd: int) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "command": " ".join(sys.argv)[:1024], "since": since}).encode()
    os.ftruncate(fd, os.pwrite(fd, text, 0))


def _holder(fd: int) -> str:
    try:
        said = json.loads(os.pread(fd, _HOLDER_BYTES, 0))
        pid, command, since = int(said["pid"]), str(said["command"]), str(said["since"])
    except (ValueError, KeyError, TypeError, OSError):
        return "who does not say its name"
    printable = "".join(c if c.isprintable() else "?" for c in f"{command}, since {since}")
    return f"pid {pid}: {printable}"
