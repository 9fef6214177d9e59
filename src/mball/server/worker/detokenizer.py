"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 6
_MAX_PENDING = 8
"""A character is at most four bytes, so four tokens; what is still broken after this many stays broken."""


class Detokenizer:
    """One sequence. A character is given out once its last byte is there; each token costs a constant amount.

    (`tokenizers.decoders.DecodeStream` has no flush and keeps broken bytes without bound.)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        context = list(prompt[-_CONTEXT:])
        # Some tokenizers strip the space before a text's first word: only with what precedes is it kept.
        self._given = [] if decode(context).endswith("\ufffd") else context
        self._given_text = decode(self._given)
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        self._pending.append(token_id)
        text = self._decode(self._given + self._pending)
        if text.endswith("\ufffd") and len(self._pending) < _MAX_PENDING:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is still held: bytes that no token completed, as U+FFFD."""
        return self._give(self._decode(self._given + self._pending)) if self._pending else ""

    def _give(self, text: str) -> str:
        new = text[len(self._given_text) :]
        self._given, self._pending = self._pending, []
        self._given_text = self._decode(self._given)
        return new
