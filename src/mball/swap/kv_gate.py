"""Whether bringing KV back beats computing it again, by what this machine was measured to do: pure.

Computing a token costs a + b × its position: attention reads all before it. Bringing bytes back costs in proportion.
Both are fitted to what was seen, older measurements counting less with each new one; of the largest ones alone: a short
step or copy is mostly what it costs to begin at all, which is paid either way. But a step follows what was brought
back, too: with it a whole beginning has to be faster than computed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["dram", "store"]

MARGIN = 1.1
"""Bringing back must be so many times as fast: where both take the same, the disk is better left alone."""
_KEPT = 0.9
"""Of an older measurement's weight, with each new one."""
_SHORT_BITS = 4
"""A sixteenth, about, of the largest step is a short one: such as follows what was brought back."""
_PATIENCE = 32
"""Smaller copies in a row, after which the larger ones before them are of the past."""
_STALE_S = 300.0
"""A rate that was refused by for so long is measured once more: the disk may have had other work."""


@dataclass(slots=True)
class Line:
    """y = a + b × x over weighted points; both at least 0."""

    w: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float, weight: float) -> None:
        for name, new in (("w", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, getattr(self, name) * _KEPT + new * weight)

    def fit(self) -> tuple[float, float] | None:
        """(a, b); None while nothing is known."""
        if self.w <= 0:
            return None
        spread = self.w * self.xx - self.x * self.x
        slope = (self.w * self.xy - self.x * self.y) / spread if spread > 1e-9 * self.w * self.xx else 0.0
        start = (self.y - slope * self.x) / self.w
        if slope < 0:
            return self.y / self.w, 0.0
        if start < 0:
            return 0.0, self.xy / self.xx
        return start, slope


@dataclass(slots=True)
class Largest:
    """Which sizes count: those of at least a quarter, about, of the largest; after `patience` smaller ones these do."""

    patience: int | None = None
    bits: int = 0
    passed_over: int = 0

    def grows(self, size: int) -> bool:
        """Whether what was measured so far counts no more."""
        bits = size.bit_length()
        if bits > self.bits or (self.passed_over == self.patience and not self.counts(size)):
            self.bits, self.passed_over = bits, 0
            return True
        return False

    def counts(self, size: int) -> bool:
        return size.bit_length() >= self.bits - 1

    def takes(self, size: int) -> bool:
        if not self.counts(size):
            self.passed_over += 1
            return False
        self.passed_over = 0
        return True


@dataclass(slots=True)
class Rate:
    """Seconds a byte."""

    seconds: float = 0.0
    nbytes: float = 0.0
    at_s: float = 0.0
    largest: Largest = field(default_factory=lambda: Largest(_PATIENCE))

    def add(self, nbytes: int, seconds: float, now_s: float) -> None:
        self.at_s = now_s
        if self.largest.grows(nbytes):
            self.seconds = self.nbytes = 0.0
        if self.largest.takes(nbytes):
            self.seconds = self.seconds * _KEPT + seconds
            self.nbytes = self.nbytes * _KEPT + nbytes


@dataclass(slots=True)
class Gate:
    """`forced` overrides every decision, for measuring. `counts`: decisions by source, as `dram:admitted`."""

    forced: bool | None = None
    counts: Counter[str] = field(default_factory=Counter)
    _compute: Line = field(default_factory=Line)
    _largest: Largest = field(default_factory=Largest)
    _short_s: float | None = None
    _rates: dict[Source, Rate] = field(default_factory=dict)

    def computed(self, start: int, count: int, seconds: float) -> None:
        """A step computed `count` tokens of one sequence from position `start` on."""
        if self._largest.grows(count):
            self._compute = Line()
        if self._largest.takes(count):
            self._compute.add(start + count / 2, seconds / count, count)
        elif count.bit_length() <= self._largest.bits - _SHORT_BITS:
            before_s = seconds if self._short_s is None else self._short_s
            self._short_s = before_s * _KEPT + seconds * (1 - _KEPT)

    def loaded(self, source: Source, nbytes: int, seconds: float, now_s: float) -> None:
        self._rates.setdefault(source, Rate()).add(nbytes, seconds, now_s)

    def forget(self, source: Source) -> None:
        """Another one is behind that name now."""
        self._rates.pop(source, None)

    def recompute_s(self, start: int, count: int) -> float | None:
        """None while nothing was computed."""
        fit = self._compute.fit()
        return None if fit is None else count * (fit[0] + fit[1] * (start + count / 2))

    def reload_s(self, source: Source, nbytes: int) -> float | None:
        """None while nothing came from there."""
        rate = self._rates.get(source)
        return None if rate is None else nbytes * rate.seconds / rate.nbytes

    def knows(self, source: Source, now_s: float) -> bool:
        """Whether it was measured, not too long ago."""
        rate = self._rates.get(source)
        return rate is not None and now_s - rate.at_s < _STALE_S

    def better(self, source: Source, start: int, count: int, nbytes: int, now_s: float, *, whole: bool = False) -> bool:
        """Whether these tokens' KV should come from there; `whole`: all of it that there is, before a last step.

        What is not known is found out by trying.
        """
        if self.forced is not None:
            return self.forced
        compute_s, reload_s = self.recompute_s(start, count), self.reload_s(source, nbytes)
        if compute_s is None or reload_s is None or not self.knows(source, now_s):
            return True
        last_s = (self._short_s or 0.0) if whole else 0.0
        return (reload_s + last_s) * MARGIN <= compute_s

    def admits(self, source: Source, start: int, count: int, nbytes: int, now_s: float) -> bool:
        """The same of a whole beginning, as a decision that is counted."""
        admitted = self.better(source, start, count, nbytes, now_s, whole=True)
        self.counts[f"{source}:{'admitted' if admitted else 'refused'}"] += 1
        return admitted


class Touches:
    """How often each of the last `most` keys was seen."""

    def __init__(self, most: int = 1 << 15) -> None:
        self._most = most
        self._seen: OrderedDict[bytes, int] = OrderedDict()

    def touch(self, key: bytes) -> int:
        """Once more; how often by now."""
        count = self._seen.pop(key, 0) + 1
        self._seen[key] = count
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)
        return count

    def count(self, key: bytes) -> int:
        return self._seen.get(key, 0)

    def forget(self, key: bytes) -> None:
        self._seen.pop(key, None)

    def clear(self) -> None:
        self._seen.clear()
