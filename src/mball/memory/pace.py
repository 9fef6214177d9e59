"""How fast work in an engine's process goes while the engine computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHARE = 0.1
_GIVES_WAY_S = 120.0


class Pace:
    """One at a time and a tenth of the time, while an engine computes, until it is hurried or has given way for two
    minutes. Beside one that rests nothing is held up. Used by many threads."""

    def __init__(self, computes: Callable[[], bool], share: float = _SHARE, gives_way_s: float = _GIVES_WAY_S) -> None:
        self._computes = computes
        self._share = share
        self._until = time.monotonic() + gives_way_s
        self._hurried = threading.Event()
        self._alone = threading.Lock()

    def hurry(self) -> None:
        """Somebody waits for it."""
        self._hurried.set()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around each part of the work."""
        if not self._gives_way():
            yield
            return
        with self._alone:
            began = time.monotonic()
            yield
            if self._gives_way():
                self._hurried.wait((time.monotonic() - began) * (1 / self._share - 1))

    def _gives_way(self) -> bool:
        return not self._hurried.is_set() and time.monotonic() < self._until and self._computes()
