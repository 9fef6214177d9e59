"""Bytes and seconds as people write and read them."""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_UNITS = {
    "": 1,
    "b": 1,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": TiB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """Bytes from an int, or from text such as `1.5GiB`, `512 MiB` or `2GB`.

    Raises ValueError for a negative number, an unknown unit, or anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"a size cannot be negative: {value}")
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"not a size: {value!r} (write 1.5GiB, 512MiB, 2GB or a number of bytes)")
    return round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format_bytes(count: int) -> str:
    """A short reading in binary units: `0 B`, `512 KiB`, `1.4 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_rate(count: int, seconds: float) -> str:
    """Bytes over seconds as GiB/s."""
    return f"{count / seconds / GiB:.2f} GiB/s" if seconds > 0 else "– GiB/s"
