"""A file system of 64 MiB, to be filled up or frozen by a test."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mball.units import MiB
from tests.needs import missing

SMALL = 64 * MiB


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Path]:
    """In memory. Where none can be mounted the test is skipped, or fails where MBALL_REQUIRE names `mount`."""
    path.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={SMALL}", "small", str(path))
    except (OSError, subprocess.CalledProcessError):
        missing("mount", "a small file system can't be mounted here: that needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), (path / "others").open("wb", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass


def freeze(path: Path) -> None:
    _mount("-o", "remount,ro", str(path))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
