"""Which way bytes take to a GPU: pure."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

WARM_SHARE = 0.9
"""With so much of an extent in the page cache it is read through it."""

FEW_CORES = 4
"""Up to so many cores the driver's registering of file pages is faster than copying them."""


class Way(StrEnum):
    RING = "ring"
    """Page cache → pinned ring → device: limited by the cores' copying."""
    MAPPED = "mapped"
    """Pages of the file or the image, registered in place → device."""
    DIRECT = "direct"
    """Disk (O_DIRECT) → pinned ring → device: the page cache is left alone."""
    BUFFERED = "buffered"
    """As `ring`, and the file's pages are dropped behind."""


EVERY_WAY = frozenset(Way)


def choose(
    *,
    resident: float | None,
    cores: int,
    mappable: bool,
    direct: bool,
    tight: bool,
    allowed: Collection[Way] = EVERY_WAY,
) -> Way:
    """The best way that is allowed; the ring where none of those allowed can be gone.

    `resident` is the share of the extent in the page cache (None: unknown), `mappable` and `direct` say what works for
    it, `tight` that the page cache has no room for the whole file.
    """
    warm = resident is None or resident >= WARM_SHARE
    disk = [Way.DIRECT] if direct else []
    disk += [Way.BUFFERED, Way.RING] if tight else [Way.RING, Way.BUFFERED]
    cached = [Way.MAPPED, Way.RING] if cores <= FEW_CORES else [Way.RING, Way.MAPPED]
    if not mappable:
        cached.remove(Way.MAPPED)
    order = cached + disk if warm else disk + cached
    return next((way for way in order if way in allowed), Way.RING)
