"""A file of answers: whole lines alone, each on the disk before it counts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mball.errors import ConfigError, MballError


class NotWritten(MballError):
    """The disk is full or failed; the file holds the lines before, all whole."""


class Answers:
    """Lines are appended. One process writes it at a time. `finished`: the custom_ids that were in it."""

    def __init__(self, path: Path) -> None:
        """Opens it, cutting off a line that a crash left half. Raises ConfigError, NotWritten."""
        self.path = path
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise _no_file(path, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{path}: another batch is writing it; wait, or name another output") from None
        try:
            self.finished, self._whole_bytes = self._read()
            self._file.truncate(self._whole_bytes)
            sync_folder(path.parent)
        except OSError as error:
            self._file.close()
            raise _no_file(path, error) from None
        except ConfigError:
            self._file.close()
            raise

    def _read(self) -> tuple[set[str], int]:
        finished, whole = set[str](), 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    finished.add(json.loads(line)["custom_id"])
                except (ValueError, KeyError, TypeError):
                    what = f"line {number} is no answer of a batch"
                    raise ConfigError(f"{self.path}: {what}; name another output") from None
        return finished, whole

    @property
    def nbytes(self) -> int:
        return self._whole_bytes

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Blocks until they are on the disk. Raises NotWritten: then none of them is there."""
        data = b"".join(map(_encode, lines))
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._whole_bytes)
            raise _not_written(self.path, error) from None
        self._whole_bytes += len(data)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _no_file(path: Path, error: OSError) -> MballError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return _not_written(path, error) if full else ConfigError(f"{path}: {error.strerror or error}")


def _not_written(path: Path, error: OSError) -> NotWritten:
    why = f"{path}: {error.strerror or error}"
    return NotWritten(f"{why}; make room and run the same again: what is answered is kept")


def _encode(line: dict[str, Any]) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can escape and UTF-8 can't hold.
        return json.dumps(line).encode() + b"\n"


@contextlib.contextmanager
def failures(path: Path) -> Iterator[Answers]:
    """A file of this run's failures alone; none is left where there were none."""
    path.unlink(missing_ok=True)
    with Answers(path) as file:
        try:
            yield file
        finally:
            if not file.nbytes:
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Its names are on the disk: a file that was made, renamed or removed there stays so. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
