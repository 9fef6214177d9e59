"""How much host memory images may have, from what the kernel says of the rest. Pure."""

from __future__ import annotations

from dataclasses import dataclass

FULL_AVG10 = 5.0
"""Per cent of the last ten seconds in which everything stood still for memory: then the kernel is near acting."""
SOME_AVG10 = 30.0
"""The same of something standing still."""
_PSI_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Reading:
    """`full` and `some` are PSI's avg10 in per cent; None where the kernel doesn't say."""

    available_bytes: int
    some: float | None = None
    full: float | None = None

    @property
    def stalls(self) -> bool:
        return (self.full or 0.0) >= FULL_AVG10 or (self.some or 0.0) >= SOME_AVG10


class Throttle:
    """The images' limit, with hysteresis: it falls at once when less than `reserve_bytes` are available or work stands
    still, so far that twice as much becomes available; it rises again after `calm_s` with that much there."""

    def __init__(self, total_bytes: int, reserve_bytes: int, calm_s: float) -> None:
        self.total_bytes = total_bytes
        self.reserve_bytes = reserve_bytes
        self.calm_s = calm_s
        self.limit_bytes = total_bytes
        self.pressed = False
        self._calm_since_s: float | None = None

    def take(self, reading: Reading, held_bytes: int, now_s: float) -> int:
        """The limit from now on; images hold `held_bytes`."""
        spare_bytes = reading.available_bytes - 2 * self.reserve_bytes
        if reading.available_bytes < self.reserve_bytes or reading.stalls:
            self._calm_since_s = None
            self.pressed = True
            wanted = held_bytes + min(0, spare_bytes)
            if reading.stalls:
                wanted = min(wanted, int(held_bytes * _PSI_SHARE))
            self.limit_bytes = max(0, min(self.limit_bytes, wanted))
        elif spare_bytes < 0:
            self._calm_since_s = None
            # Nothing has to go, but nothing more may come.
            self.limit_bytes = min(self.limit_bytes, held_bytes)
        else:
            since = self._calm_since_s = now_s if self._calm_since_s is None else self._calm_since_s
            there_bytes = min(self.total_bytes, held_bytes + spare_bytes)
            if not self.pressed or now_s - since >= self.calm_s:
                self.pressed = False
                self.limit_bytes = there_bytes
        return self.limit_bytes


def parse(text: str) -> tuple[float, float]:
    """(some, full) avg10 of a PSI file. Raises ValueError."""
    found = {"some": 0.0, "full": 0.0}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        fields = dict(field.split("=", 1) for field in rest.split())
        if kind not in found or "avg10" not in fields:
            raise ValueError(f"not a line of PSI: {line!r}")
        found[kind] = float(fields["avg10"])
    return found["some"], found["full"]


def reserve_bytes(memory_bytes: int) -> int:
    """What images leave to everything else, where nobody says: a twentieth, 256 MiB to 4 GiB."""
    return max(256 << 20, min(memory_bytes // 20, 4 << 30))
