"""What a shard without a manifest is known by: a look here and there."""

from __future__ import annotations

import hashlib
import os

from mball.errors import ReadError
from mball.loader.checkpoint import Shard

_SAMPLES = 16
_SAMPLE_BYTES = 4096


def sampled(shard: Shard) -> str:
    """Its name, size, time of change, and the SHA-256 of its header and of samples of its data. Raises ReadError."""
    path = shard.path
    try:
        with path.open("rb", buffering=0) as file:
            fd = file.fileno()
            hashed = hashlib.sha256(os.pread(fd, shard.data_start, 0))
            for number in range(_SAMPLES):
                at = shard.data_start + number * shard.data_bytes // _SAMPLES
                hashed.update(os.pread(fd, min(_SAMPLE_BYTES, shard.size_bytes - at), at))
            changed = os.fstat(fd).st_mtime_ns
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror}", file=str(path)) from error
    return f"{path.name} {shard.size_bytes} {changed} {hashed.hexdigest()}"
