"""The file that a worker's output goes to. Without a place for it a worker runs all the same."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

_TAIL_LINES = 20
_TAIL_BYTES = 8192


def log_path(folder: Path, model: str) -> Path:
    plain = "".join(c if c.isalnum() or c in "-._" else "_" for c in model)
    return folder / f"{plain}.log"


def open_log(path: Path, *, limit_bytes: int = 0, flags: int = os.O_APPEND) -> int:
    """A descriptor to write to; a log over the limit (0: none) becomes `.1` first. Where the disk takes none nothing is
    kept, and a warning says so.

    Blocks. Raises OSError where no file can be opened at all.
    """
    try:
        if limit_bytes and path.exists() and path.stat().st_size > limit_bytes:
            path.replace(path.with_name(path.name + ".1"))
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    except OSError as error:
        # Here alone: a zygote of an engine's own interpreter has none.
        import structlog

        structlog.get_logger(__name__).warning(
            "no log: why a worker failed will not be known", file=str(path), reason=error.strerror
        )
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def log_tail(path: Path) -> str:
    """Its last lines. Blocks for a moment."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = deque(file.read().decode(errors="replace").splitlines(), maxlen=_TAIL_LINES)
    except OSError as error:
        return f"({error})"
    return "\n".join(lines)
