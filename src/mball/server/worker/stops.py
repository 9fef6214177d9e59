"""Stop strings, found across token borders."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One sequence's. Text is held back while it may still become a stop string; where the pieces are cut makes no
    difference: the stop string that is complete first wins, the longer of two that end together. It is `met` then."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.met: str | None = None

    def add(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string was met). After a stop nothing more is taken."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, at = min(found)
            self.met = text[at:end]
            return text[:at], True
        certain = len(text) - self._open_length(text)
        self._held = text[certain:]
        return text[:certain], False

    def _open_length(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def flush(self) -> str:
        """What was held back: the sequence ended and it is no stop string."""
        held, self._held = self._held, ""
        return held
