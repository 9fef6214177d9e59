"""Checksums of 16 bytes: xxh3_128, and where an interpreter has no xxhash, as an engine's own may not, SHA-256."""

from __future__ import annotations

import hashlib

try:
    import xxhash
except ModuleNotFoundError:
    xxhash = None  # type: ignore[assignment]

CHECKSUM_BYTES = 16
XXH3, SHA256 = 1, 2
OURS = SHA256 if xxhash is None else XXH3
"""What this process writes with."""
KNOWN = (SHA256,) if xxhash is None else (XXH3, SHA256)
"""What it can check."""


def checksum(kind: int, *parts: bytes | memoryview) -> bytes:
    """Of the parts, one after the other. `kind` is one of KNOWN."""
    hashed = hashlib.sha256() if kind == SHA256 else xxhash.xxh3_128()
    for part in parts:
        hashed.update(part)
    return hashed.digest()[:CHECKSUM_BYTES]
