"""What a sequence may still say, as a set of tokens (llguidance, https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import llguidance
import numpy as np
from numpy.typing import NDArray

_NOT_ALLOWED = "doesn't satisfy the grammar"


class Grammar:
    """One sequence's, from its first token on: the engine's thread owns it once the sequence is submitted.

    Past what the grammar's limits allow it is in error, and takes no token any more. `param` is the field of the
    request that it keeps.
    """

    def __init__(self, matcher: llguidance.LLMatcher, param: str) -> None:
        self._matcher = matcher
        self.param = param

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy(), self.param)

    @property
    def error(self) -> str | None:
        text = self._matcher.get_error()
        return text.partition("<non-verbose/>")[0].strip() if text else None

    @property
    def too_complex(self) -> bool:
        """In error by its limits, not by a token that it does not allow."""
        return self.error is not None and _NOT_ALLOWED not in self.error

    def allowed(self, vocab_size: int) -> NDArray[np.bool_]:
        """(vocab_size,): which tokens may come next; the end token among them where the text is whole."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> bool:
        """Whether it was a token that may come next. The grammar is past it then."""
        # In error it takes the end token still.
        return self._matcher.consume_token(token_id) and not self._matcher.is_error()
