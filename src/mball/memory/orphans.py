"""What a daemon that crashed left behind: found by pid, start time, boot and the run's mark, and ended for certain.

Every process of a run carries its mark in its environment, and so does what it forks. A run's record says which run
it is and which workers it started; the daemon holds a lock on it for as long as it lives. So a record that can be
locked is a dead daemon's. Only the standard library is imported here: the keeper has to start in a moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import stat
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mball.device.lock import lock_within
from mball.device.proc import PROC, start_ticks
from mball.errors import ConfigError

MARK = "MBALL_RUN"
"""The environment variable that names the run."""
_POLL_S = 0.05
_COMPACT_AT = 256


@dataclass(frozen=True, slots=True)
class Born:
    """A process for ever: no other has this pid and this start."""

    pid: int
    start_ticks: int

    @property
    def lives(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks


def runs_dir() -> Path:
    """The user's own folder of records, private. Raises ConfigError where another user holds its place."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "mball" if base and Path(base).is_dir() else Path(f"/tmp/mball-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(f"{folder} is not a folder of this user's: remove it, or set XDG_RUNTIME_DIR")
    folder.chmod(0o700)
    return folder


class Record:
    """This run's record, locked. Methods block for a moment: call them off the loop."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self.run = uuid.uuid4().hex
        self.path = folder / f"{self.run}.run"
        self._born: list[Born] = []
        made = self.path.with_suffix(".new")
        self._fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._head = _line(run=self.run, boot_id=boot_id(), pid=os.getpid(), command=" ".join(sys.argv))
        os.write(self._fd, self._head)
        # Only now may others see it: nobody is to find it unlocked.
        made.rename(self.path)

    def add(self, pid: int) -> None:
        ticks = start_ticks(pid)
        if ticks is None:
            return
        self._born.append(Born(pid, ticks))
        if len(self._born) > _COMPACT_AT:
            self._born = [born for born in self._born if born.lives]
            lines = b"".join(_line(pid=born.pid, start_ticks=born.start_ticks) for born in self._born)
            os.ftruncate(self._fd, os.pwrite(self._fd, self._head + lines, 0))
            os.lseek(self._fd, 0, os.SEEK_END)
        else:
            os.write(self._fd, _line(pid=pid, start_ticks=ticks))

    def close(self) -> None:
        """The run has ended as it should, and left nothing."""
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


def reap_crashed(folder: Path, *, term_s: float, kill_s: float) -> list[int]:
    """Ends what crashed daemons of this user left, and forgets them. The pids that it ended."""
    ended: list[int] = []
    for path in folder.glob("*.run"):
        ended += reap(path, term_s=term_s, kill_s=kill_s)
    return ended


def reap(path: Path, *, term_s: float, kill_s: float, wait_s: float = 0.0) -> list[int]:
    """Ends what the run of this record left: TERM, then KILL, to whole groups. The pids that it ended.

    Nothing is done where its daemon lives (still, after `wait_s`) or its record is gone. The record goes once nothing
    of the run lives; else the next start tries again.
    """
    with _locked(path, wait_s) as text:
        if text is None:
            return []
        lines = list(_read(text))
        head = lines[0] if lines else {}
        run = str(head.get("run") or path.stem)
        # Nothing outlives a boot, and its pids say nothing after it.
        if head.get("boot_id", boot_id()) != boot_id():
            path.unlink(missing_ok=True)
            return []
        born = [Born(line["pid"], line["start_ticks"]) for line in lines if "start_ticks" in line]
        ended = _end(run, born, term_s, kill_s)
        if not family(run):
            path.unlink(missing_ok=True)
        return ended


def _end(run: str, recorded: list[Born], term_s: float, kill_s: float) -> list[int]:
    ended: dict[int, Born] = {}
    for number, deadline_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        deadline, told = time.monotonic() + deadline_s, set[Born]()
        # One that is dying has lost its environment before it is gone.
        while alive := list({*family(run), *(born for born in ended.values() if born.lives)}):
            for born in alive:
                ended[born.pid] = born
                # Again and again: what is being ended may fork.
                if born not in told or number == signal.SIGKILL:
                    told.add(born)
                    _signal(born, number, group=born in recorded)
            if time.monotonic() > deadline:
                break
            _wait(alive, _POLL_S)
    return [born.pid for born in ended.values() if not born.lives]


def _signal(born: Born, number: int, *, group: bool) -> None:
    """To this process and no other: the pidfd is opened before the start time is looked at."""
    try:
        pidfd = os.pidfd_open(born.pid)
    except ProcessLookupError:
        return
    try:
        if born.lives:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, number)
                if group and os.getpgid(born.pid) == born.pid:
                    os.killpg(born.pid, number)
    finally:
        os.close(pidfd)


def _wait(alive: list[Born], timeout_s: float) -> None:
    """Until one of them has ended. Not for long: what is being ended may fork."""
    with contextlib.ExitStack() as opened:
        ends = select.poll()
        for born in alive:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(born.pid)
                opened.callback(os.close, pidfd)
                ends.register(pidfd, select.POLLIN)
        ends.poll(1000 * timeout_s)


def family(run: str) -> list[Born]:
    """Every living process of this user that carries the run's mark, but for this one."""
    mark, found = f"{MARK}={run}".encode(), []
    for entry in os.scandir(PROC):
        if entry.name.isdecimal() and (pid := int(entry.name)) != os.getpid():
            ticks = start_ticks(pid)
            if ticks is not None and mark in _environment(pid):
                found.append(Born(pid, ticks))
    return found


def strays(run: str, known: Iterable[int]) -> list[Born]:
    """Processes of the run that this one has inherited from those that ended, but for the known."""
    ours = set(known)
    return [born for born in family(run) if born.pid not in ours and parent(born.pid) == os.getpid()]


def _environment(pid: int) -> list[bytes]:
    try:
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def parent(pid: int) -> int | None:
    """Its parent's pid, also where it has ended and was not waited for."""
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


@contextlib.contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[str | None]:
    """Its text, under its lock; None where another holds that, or the record is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        text = None
        if lock_within(fd, wait_s) and os.fstat(fd).st_nlink:
            text = os.pread(fd, 1 << 20, 0).decode(errors="replace")
        yield text
    finally:
        os.close(fd)


def _read(text: str) -> Iterator[dict[str, Any]]:
    """Its whole lines: a crash may have cut the last one."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"
