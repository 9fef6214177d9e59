"""JSON records in a folder: each as a whole or not at all, and on the disk before it counts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from mball.errors import StorageFailed
from mball.server.batch.answers import sync_folder

SUFFIX = ".json"
PART = ".part"
"""What a file that is not whole ends in: a crash leaves them, and a start removes them."""

_log = structlog.get_logger(__name__)


def write(path: Path, fields: dict[str, Any]) -> None:
    """Blocks. Raises StorageFailed: then what was there before is there."""
    part = path.with_suffix(PART)
    try:
        with part.open("w") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise failed(path, error) from None


def remove(*paths: Path) -> None:
    """In this order, those that are there. Blocks. Raises StorageFailed."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError as error:
            raise failed(path, error) from None


def read(folder: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """Those whose names begin so, in any order; a damaged one is warned of and passed over. Raises StorageFailed."""
    try:
        paths = [path for path in folder.iterdir() if path.name.startswith(prefix) and path.suffix == SUFFIX]
    except OSError as error:
        raise failed(folder, error) from None
    for path in paths:
        try:
            fields = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            _log.warning("a record can't be read", file=str(path), error=str(error))
            continue
        if isinstance(fields, dict):
            yield fields


def failed(path: Path, error: OSError) -> StorageFailed:
    return StorageFailed(f"files and batches: {path.name}: {error.strerror or error}")
