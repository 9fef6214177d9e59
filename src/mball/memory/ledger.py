"""Bytes promised of one memory: to whom, and how many are left."""

from __future__ import annotations

from mball.errors import DeviceOutOfMemory, TransitionError


class Ledger:
    """Promises never exceed the total. Promise before the bytes are taken; give back only what is proven free.

    `limit_bytes`, at most the total, bounds what is promised from now on; what was promised before may exceed it.
    """

    def __init__(self, name: str, total_bytes: int) -> None:
        self.name = name
        self.total_bytes = total_bytes
        self.limit_bytes = total_bytes
        self._held: dict[str, int] = {}

    @property
    def promised_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.promised_bytes)

    @property
    def excess_bytes(self) -> int:
        """Promised over the limit."""
        return max(0, self.promised_bytes - self.limit_bytes)

    def limit(self, nbytes: int) -> None:
        self.limit_bytes = max(0, min(nbytes, self.total_bytes))

    def held(self, holder: str) -> int:
        return self._held.get(holder, 0)

    def holders(self) -> dict[str, int]:
        return dict(self._held)

    def promise(self, holder: str, nbytes: int) -> None:
        """Sets what `holder` is promised, more or less than before.

        Raises DeviceOutOfMemory where the rest is too small; then nothing changes.
        """
        if nbytes < 0:
            raise TransitionError(f"{self.name}: a promise of {nbytes} bytes to {holder}")
        held = self.held(holder)
        free = max(held, self.limit_bytes - self.promised_bytes + held)
        if nbytes > free:
            raise DeviceOutOfMemory(f"{self.name}, for {holder}", nbytes, free, self.total_bytes)
        self._held[holder] = nbytes
        if nbytes == 0:
            del self._held[holder]

    def give_back(self, holder: str) -> None:
        """Ends all promises to `holder`."""
        self._held.pop(holder, None)
