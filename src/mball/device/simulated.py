"""A GPU that is only pretended: a file shared by processes holds who has how many bytes, and capacity is enforced."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mball.device import proc
from mball.device.device import Foreign, strangers
from mball.device.lock import lock_within
from mball.errors import DeviceError, DeviceOutOfMemory

_LOCK_S = 10.0


@dataclass
class _Holder:
    start_ticks: int
    nbytes: int


@dataclass
class _State:
    total_bytes: int
    context_bytes: int = 0
    peak_bytes: int = 0
    refusals: int = 0
    holders: dict[int, _Holder] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        return sum(holder.nbytes for holder in self.holders.values())


class SimulatedDevice:
    """Processes attach (which costs a context, as on a GPU), take and give; what a dead one held is free at once.

    Methods block for as long as another process holds the file's lock, 10 s at most (DeviceError).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._locked() as state:
            self.total_bytes = state.total_bytes
            self.context_bytes = state.context_bytes

    @classmethod
    def create(cls, path: str | Path, total_bytes: int, *, context_bytes: int = 0) -> SimulatedDevice:
        """A new, empty device at `path`."""
        _write(Path(path), _State(total_bytes, context_bytes))
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> SimulatedDevice:
        """Raises DeviceError where there is none."""
        return cls(path)

    @property
    def name(self) -> str:
        return f"simulated:{self.path}"

    @property
    def peak_bytes(self) -> int:
        """The most that was ever held at once."""
        with self._locked() as state:
            return state.peak_bytes

    @property
    def refusals(self) -> int:
        """How many times more was wanted than was free."""
        with self._locked() as state:
            return state.refusals

    def holders(self) -> dict[int, int]:
        """Bytes by pid."""
        with self._locked() as state:
            return {pid: holder.nbytes for pid, holder in state.holders.items()}

    def process_bytes(self, pid: int, baseline_bytes: int = 0) -> int | None:
        """Of the one process alone, as others may be many."""
        with self._opened() as state:
            holder = state.holders.get(pid)
        return holder.nbytes if holder is not None and _lives(pid, holder) else None

    def free_bytes(self) -> int:
        with self._locked() as state:
            return state.total_bytes - state.used_bytes

    def foreign(self, ours: Mapping[int, int]) -> Foreign:
        return Foreign(strangers(self.holders(), ours))

    def attach(self, pid: int) -> None:
        """Charges the context of a process. Raises DeviceOutOfMemory."""
        self._change(pid, self.context_bytes)

    def take(self, pid: int, nbytes: int) -> None:
        """Raises DeviceOutOfMemory, as a GPU would; then nothing is taken."""
        self._change(pid, nbytes)

    def give(self, pid: int, nbytes: int) -> None:
        """Raises DeviceError for more than the process holds."""
        self._change(pid, -nbytes)

    def _change(self, pid: int, delta: int) -> None:
        with self._locked(write=True) as state:
            free = state.total_bytes - state.used_bytes
            holder = state.holders.get(pid)
            if delta > free:
                state.refusals += 1
            elif holder is None or holder.nbytes + delta < 0:
                held = holder.nbytes if holder else 0
                start = proc.start_ticks(pid)
                if held + delta < 0 or start is None:
                    raise DeviceError(f"{self.name}: process {pid} holds {held} bytes, can't give {-delta}")
                state.holders[pid] = _Holder(start, delta)
            else:
                holder.nbytes += delta
            state.peak_bytes = max(state.peak_bytes, state.used_bytes)
        if delta > free:
            raise DeviceOutOfMemory(self.name, delta, free, self.total_bytes)

    @contextlib.contextmanager
    def _locked(self, *, write: bool = False) -> Iterator[_State]:
        """The state under the lock, less the dead; `write` keeps the changes."""
        with self._opened() as state:
            state.holders = {pid: holder for pid, holder in state.holders.items() if _lives(pid, holder)}
            yield state
            if write:
                _write(self.path, state)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[_State]:
        """The state under the lock, the dead too."""
        fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not lock_within(fd, _LOCK_S):
                raise DeviceError(f"{self.name}: another process has held its lock for {_LOCK_S:.0f} s")
            yield _read(self.path)
        finally:
            os.close(fd)


def _lives(pid: int, holder: _Holder) -> bool:
    return proc.start_ticks(pid) == holder.start_ticks


def _read(path: Path) -> _State:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise DeviceError(f"simulated:{path}: no such device; make one with SimulatedDevice.create") from None
    holders = {int(pid): _Holder(*entry) for pid, entry in data.pop("holders").items()}
    return _State(**data, holders=holders)


def _write(path: Path, state: _State) -> None:
    """Replaces the file as a whole: a process killed in the middle leaves the old one."""
    holders = {str(pid): [holder.start_ticks, holder.nbytes] for pid, holder in state.holders.items()}
    text = json.dumps({**vars(state), "holders": holders})
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
