"""A weight image in a store, read from any byte to any, straight into the memory that it is for."""

from __future__ import annotations

import os
import threading

from mball.errors import SwapMiss
from mball.swap.disk import aligned
from mball.swap.place import Place
from mball.swap.slots import Slots


class StoredImage:
    """Thread-safe; a thread keeps the slot that it read last, as a tensor may begin and end within one."""

    def __init__(self, slots: Slots, place: Place) -> None:
        self._slots = slots
        self._place = place
        self._kept = threading.local()

    def read(self, into: memoryview, at: int) -> None:
        """Fill `into` from byte `at` of the image. Whole slots go straight there, fastest to where a page begins.

        Raises SwapMiss; then what is in `into` is worth nothing.
        """
        slot_bytes, end = self._slots.layout.slot_bytes, at + len(into)
        whole = min(-(-at // slot_bytes) * slot_bytes, end)
        rest = end if end == self._place.nbytes else max(whole, end // slot_bytes * slot_bytes)
        try:
            self._part(into[: whole - at], at)
            if rest > whole:
                self._slots.read(self._place, into[whole - at : rest - at], whole)
            self._part(into[rest - at :], rest)
        except OSError as error:
            raise SwapMiss("memory", f"no memory to read into: {os.strerror(error.errno or 0)}") from error

    def _part(self, into: memoryview, at: int) -> None:
        """Of a single slot."""
        if not len(into):
            return
        slot_bytes = self._slots.layout.slot_bytes
        number = at // slot_bytes
        begin = number * slot_bytes
        if getattr(self._kept, "number", None) != number:
            if not hasattr(self._kept, "slot"):
                self._kept.slot = aligned(slot_bytes)
            self._kept.number = None
            there = self._kept.slot[: min(slot_bytes, self._place.nbytes - begin)]
            self._slots.read(self._place, there, begin)
            self._kept.number = number
        into[:] = self._kept.slot[at - begin : at - begin + len(into)]
