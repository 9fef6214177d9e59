"""A memory cgroup for tests, where this user may make one: version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.needs import missing

_ROOT = Path("/sys/fs/cgroup")
_END_S = 60.0


@dataclass(frozen=True, slots=True)
class Cgroup:
    folder: Path
    limit_file: str
    used_file: str

    def limit(self, nbytes: int) -> None:
        (self.folder / self.limit_file).write_text(str(nbytes))

    def used_bytes(self) -> int:
        """Page cache of what its processes read included."""
        return int((self.folder / self.used_file).read_text())

    def kills(self) -> int:
        """Processes that the kernel ended for lack of memory."""
        for name in ("memory.oom_control", "memory.events"):
            if (file := self.folder / name).exists():
                counts = dict(line.split() for line in file.read_text().splitlines())
                return int(counts["oom_kill"])
        raise FileNotFoundError(self.folder)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This process is in it, and whatever it starts stays."""
        home = _own(self.folder.parent)
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (home / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def cgroup() -> Iterator[Cgroup]:
    """Where none can be made the test is skipped, or fails where MBALL_REQUIRE names `cgroup`."""
    made = None
    for parent, files in (
        (_ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        (_ROOT, ("memory.max", "memory.current")),
    ):
        folder = parent / f"mball-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            if (folder / files[0]).exists():
                made = Cgroup(folder, *files)
                break
            folder.rmdir()
    if made is None:
        missing("cgroup", "no memory cgroup can be made here")
    try:
        yield made
    finally:
        _remove(made.folder)


def _remove(folder: Path) -> None:
    """Once the last of its processes is gone, which the kernel tells nobody of a version 1."""
    deadline = time.monotonic() + _END_S
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _own(root: Path) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names == ("memory" if root.name == "memory" else ""):
            return root / path.lstrip("/")
    return root
