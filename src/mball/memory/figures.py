"""What was measured of a model: how much it holds, and how long its moves take."""

from __future__ import annotations

from dataclasses import dataclass, field

from mball.memory.rates import Smoothed
from mball.memory.states import Weights

_DOWN_SHARE = 0.3
_WINDOW_S = 60.0


@dataclass
class HighWater:
    """The most that was held, or was asked at once. It rises at once, and comes down by three tenths of the way for
    each minute in which the model was used and held less: one that does nothing shows nothing of what it needs."""

    value: int = 0
    peak: int = 0
    used: bool = False
    since_s: float | None = None

    def add(self, nbytes: int, now_s: float, *, used: bool) -> None:
        self.value = max(self.value, nbytes)
        if self.since_s is None:
            self.since_s = now_s
        self.peak = max(self.peak, nbytes)
        self.used = self.used or used
        if now_s - self.since_s >= _WINDOW_S and self.used:
            self.value -= int(_DOWN_SHARE * (self.value - self.peak))
            self.start_anew()

    def start_anew(self) -> None:
        """What was held since the last minute began no longer counts: the model was off the device, or was squeezed."""
        self.peak, self.used, self.since_s = 0, False, None


@dataclass(frozen=True, slots=True)
class Needs:
    """Device bytes of a model on the device, by part, as its worker announced them (or its files, for lack of one)."""

    context_bytes: int
    weights_bytes: int
    kv_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.context_bytes + self.weights_bytes + self.kv_bytes + self.working_bytes


@dataclass
class Figures:
    """Smoothed. `load_rate` in bytes a second and `last_swap_s` are of the last promotion; `source_rate` is that at
    which its files are read; `balloon_s` is what taking back what a balloon took lasts; `busy` is how many
    requests were inside at once. `needs` are kept for the time
    when no worker lives."""

    start_s: Smoothed = field(default_factory=Smoothed)
    demote_s: Smoothed = field(default_factory=Smoothed)
    balloon_s: Smoothed = field(default_factory=Smoothed)
    source_rate: Smoothed = field(default_factory=Smoothed)
    promote_s: dict[Weights, Smoothed] = field(default_factory=lambda: {w: Smoothed() for w in Weights})
    held: HighWater = field(default_factory=HighWater)
    busy: HighWater = field(default_factory=HighWater)
    needs: Needs | None = None
    load_rate: float | None = None
    last_swap_s: float | None = None
