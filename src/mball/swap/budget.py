"""Bytes that may be written in a day: pure. An SSD bears so many, and no more."""

from __future__ import annotations

from dataclasses import dataclass

DAY_S = 86400
_AHEAD = 64


@dataclass(slots=True)
class Budget:
    """`limit_bytes` None sets none. `day` counts days of UTC since 1970.

    `promised_bytes` is what the disk says was written on that day. It is said before the writing: who comes after a
    crash believes it, and so counts rather too much than too little.
    """

    limit_bytes: int | None
    day: int = 0
    used_bytes: int = 0
    promised_bytes: int = 0

    def resume(self, day: int, promised_bytes: int) -> None:
        """As a store's index says."""
        self.day, self.used_bytes, self.promised_bytes = day, promised_bytes, promised_bytes

    def admits(self, nbytes: int, now_s: float) -> bool:
        self._begin(now_s)
        return self.limit_bytes is None or self.used_bytes + nbytes <= self.limit_bytes

    def promised(self, nbytes: int) -> bool:
        """Whether so many more may be written without saying so on the disk before."""
        return self.limit_bytes is None or self.used_bytes + nbytes <= self.promised_bytes

    def charge(self, nbytes: int, now_s: float) -> None:
        self._begin(now_s)
        self.used_bytes += nbytes

    def ahead(self, nbytes: int) -> int:
        """What to promise so that `nbytes` and some more can be written; within the limit, and no less than before."""
        if self.limit_bytes is None:
            return self.used_bytes
        wanted = min(self.limit_bytes, self.used_bytes + nbytes + self.limit_bytes // _AHEAD)
        return max(self.used_bytes, self.promised_bytes, wanted)

    def _begin(self, now_s: float) -> None:
        """A clock that was set back grants nothing anew, and one that ran far ahead for a while blocks no days."""
        today = int(now_s // DAY_S)
        if today > self.day:
            self.used_bytes = self.promised_bytes = 0
        if today > self.day or today < self.day - 1:
            self.day = today
