"""How much one call of a worker's for the swap store may ask for, so that it and its answer fit one message."""

from __future__ import annotations

MOST_KEYS = 256
MOST_WANTS = 96
MOST_LEASES = 1024
MOST_SLOTS = 2000
"""Of all places in one answer: each may be an extent of its own."""
