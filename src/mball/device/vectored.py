"""System calls that fill or empty several buffers at once."""

from __future__ import annotations

MOST_BUFFERS = 1024
"""Of one call (IOV_MAX)."""


def after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of them after so many bytes."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []
