"""Switching time that a device has saved up."""

from __future__ import annotations


class Allowance:
    """Seconds that may be spent on switching at once: `most_s` at the start and at most, `share` of the time more.

    What is spent may overdraw it, and nothing is allowed until that is made up for. So over any time t, switching that
    began while there was some left takes `most_s` + `share` × t at most, and the last switch.
    """

    def __init__(self, share: float, most_s: float, now_s: float) -> None:
        self._share = share
        self._most_s = most_s
        self._saved_s = most_s
        self._at_s = now_s

    def at(self, now_s: float) -> float:
        """What is left; below 0 where it is overdrawn."""
        return min(self._most_s, self._saved_s + self._share * max(0.0, now_s - self._at_s))

    def spend(self, seconds: float, now_s: float) -> None:
        self._saved_s = self.at(now_s) - seconds
        self._at_s = max(self._at_s, now_s)
