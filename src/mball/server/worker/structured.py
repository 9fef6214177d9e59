"""Structured output: JSON schemas as grammars, compiled within bounds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mball.errors import InvalidRequest
from mball.server.engine.grammar import Grammar
from mball.server.worker.schemas import MAX_SCHEMA_BYTES, patterns_of
from mball.server.worker.tokenizer import Tokenizer
from mball.server.worker.values import wrong

_LIMITS = LLParserLimits(
    initial_lexer_fuel=400_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# What a schema says itself in `x-guidance` gives way to these. Blanks have an end: a weak model else writes on and on.
GUIDANCE: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n]{1,16}",
    "coerce_one_of": False,
    "lenient": False,
}
_QUOTED = 500
_REHEARSED = 32
"""Steps of a pattern: what takes too many states shows in some ten of them."""
_REHEARSAL_S = 0.5


class Grammars:
    """Of one model. One thread at a time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None

    def of_schema(self, schema: str, param: str) -> Grammar:
        """The texts that are JSON of the schema. Raises InvalidRequest, which names `param`. Blocks."""
        grammar = self._of_schema(schema, param)
        self._rehearse([schema], param)
        return grammar

    def _of_schema(self, schema: str, param: str) -> Grammar:
        try:
            source = LLMatcher.grammar_from_json_schema(schema, overrides=GUIDANCE)
        except ValueError as error:
            raise _refused(str(error), param) from None
        return self._compiled(source, param)

    def of_source(self, source: str, schemas: Iterable[str], param: str) -> Grammar:
        """The texts of a grammar in llguidance's own notation, with these schemas in it. Raises InvalidRequest, which
        names `param`. Blocks."""
        if len(source) > 2 * MAX_SCHEMA_BYTES:
            raise wrong(param, f"has {len(source)} bytes with its schemas, over {2 * MAX_SCHEMA_BYTES}")
        grammar = self._compiled(LLMatcher.grammar_from_lark(source), param)
        self._rehearse(schemas, param)
        return grammar

    def _compiled(self, source: str, param: str) -> Grammar:
        matcher = LLMatcher(self._of_tokenizer(), source, log_level=0, limits=_LIMITS)
        # Some of what is too complex shows in the first steps alone.
        first = matcher.deep_copy()
        for start in ("", "{"):
            first.try_consume_tokens(self._of_tokenizer().tokenize_str(start))
            first.compute_bitmask()
        if first.is_error():
            raise _refused(first.get_error(), param)
        return Grammar(matcher, param)

    def _rehearse(self, schemas: Iterable[str], param: str) -> None:
        """Some steps of each pattern, for half a second at most: one that takes too many states would fail in the
        middle of an answer. Raises InvalidRequest, which names it. Blocks."""
        deadline = time.monotonic() + _REHEARSAL_S
        for pattern in set().union(*map(patterns_of, schemas)):
            try:
                grammar = self._of_schema(json.dumps({"type": "string", "pattern": pattern}), param)
            except InvalidRequest:
                continue  # a value that has such a name
            for step in range(_REHEARSED):
                if time.monotonic() > deadline:
                    return
                tokens = np.setdiff1d(np.flatnonzero(grammar.allowed(self._vocab_size)), self._eos_token_ids)
                # Any of them, and another each time.
                if not len(tokens) or not grammar.accept(int(tokens[step * 7919 % len(tokens)])):
                    break
            if grammar.too_complex:
                raise _refused(f"its pattern {pattern[:_QUOTED]!r}: {grammar.error}", param)

    def _of_tokenizer(self) -> LLTokenizer:
        if self._vocabulary is None:
            try:
                self._vocabulary = LLTokenizer(
                    self._tokenizer.serialized(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
                )
            except ValueError as error:
                why = f"structured output does not know this model's tokenizer: {str(error)[:_QUOTED]}"
                raise InvalidRequest(why, code="unsupported_parameter") from None
        return self._vocabulary


def _refused(why: str, param: str) -> InvalidRequest:
    why = " ".join(why.partition("<non-verbose/>")[0].split())[:_QUOTED]
    return InvalidRequest(f"`{param}` can't be kept to: {why}", param=param, code="invalid_schema")
