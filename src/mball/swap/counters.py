"""What happened to a store since it was opened, by numbers."""

from __future__ import annotations

import threading
from collections import Counter


class Counters:
    """Names are `what` or `what:reason`. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def __getitem__(self, name: str) -> int:
        with self._lock:
            return self._counts[name]

    def all(self) -> dict[str, int]:
        with self._lock:
            return dict(sorted(self._counts.items()))
