"""One thread that does one thing after the other, and ends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class Lane:
    """A daemon: what hangs in the kernel keeps no process from ending. What is queued must not raise."""

    def __init__(self, name: str) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, act: Callable[[], None]) -> bool:
        """False where it is closed."""
        with self._changed:
            if self._closed:
                return False
            self._queue.append(act)
            self._changed.notify_all()
            return True

    def idle(self, deadline_s: float) -> bool:
        """Waits until all that was queued is done; False where it is not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, deadline_s)

    def close(self, deadline_s: float) -> bool:
        """Does what is queued, as far as there is time, gives the rest up and ends the thread; False where that hangs.
        Idempotent."""
        ends = time.monotonic() + deadline_s
        self.idle(deadline_s / 2)
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(max(0.0, ends - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or bool(self._queue))
                if not self._queue:
                    return
                act = self._queue.popleft()
                self._busy = True
            act()
