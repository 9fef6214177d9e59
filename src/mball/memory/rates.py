"""Measured figures, smoothed: rates of arrival, and seconds that moves take."""

from __future__ import annotations

import math
from dataclasses import dataclass

_NEW_SHARE = 0.3


@dataclass
class Rate:
    """Events a second, older ones counting less: by 1/e per `window_s`."""

    window_s: float
    _sum: float = 0.0
    _at_s: float = 0.0

    def count(self, now_s: float) -> None:
        self._sum = self._faded(now_s) + 1.0
        self._at_s = now_s

    def resume(self, rate: float, now_s: float) -> None:
        """Goes on from a rate that was known."""
        self._sum, self._at_s = rate * self.window_s, now_s

    def at(self, now_s: float) -> float:
        return self._faded(now_s) / self.window_s

    def _faded(self, now_s: float) -> float:
        return self._sum * math.exp(-max(0.0, now_s - self._at_s) / self.window_s)


@dataclass
class Smoothed:
    """The first measurement as it is; each later one moves it by three tenths of the way."""

    value: float | None = None

    def add(self, measured: float) -> None:
        self.value = measured if self.value is None else self.value + _NEW_SHARE * (measured - self.value)
