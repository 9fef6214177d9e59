"""Structured output: JSON schemas as grammars, compiled within bounds."""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mball.errors import InvalidRequest
from mball.server.engine.grammar import Grammar
from mball.server.worker.tokenizer import Tokenizer
from mball.server.worker.values import wrong

MAX_SCHEMA_BYTES = 64 * 1024
"""Such a schema, of 2,000 properties, takes 0.5 s and 2 MB (measured on one core of a server)."""

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
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_QUOTED = 500


class Grammars:
    """Of one model. One thread at a time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None

    def of_schema(self, schema: str, param: str) -> Grammar:
        """The texts that are JSON of the schema. Raises InvalidRequest, which names `param`. Blocks."""
        try:
            source = LLMatcher.grammar_from_json_schema(schema, overrides=GUIDANCE)
        except ValueError as error:
            raise _refused(str(error), param) from None
        return self._compiled(source, param)

    def of_source(self, source: str, param: str) -> Grammar:
        """The texts of a grammar in llguidance's own notation. Raises InvalidRequest, which names `param`. Blocks."""
        if len(source) > 2 * MAX_SCHEMA_BYTES:
            raise wrong(param, f"has {len(source)} bytes with its schemas, over {2 * MAX_SCHEMA_BYTES}")
        return self._compiled(LLMatcher.grammar_from_lark(source), param)

    def _compiled(self, source: str, param: str) -> Grammar:
        matcher = LLMatcher(self._of_tokenizer(), source, log_level=0, limits=_LIMITS)
        # Some of what is too complex shows in the first steps alone.
        first = matcher.deep_copy()
        for start in ("", "{"):
            first.try_consume_tokens(self._of_tokenizer().tokenize_str(start))
            first.compute_bitmask()
        if first.is_error():
            raise _refused(first.get_error(), param)
        return Grammar(matcher)

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


def read_response_format(value: Any) -> str | None:
    """The JSON text of the schema that OpenAI's `response_format` asks for; None where it asks for text.

    Raises InvalidRequest.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    known: dict[Any, set[str]] = {"text": set(), "json_object": set(), "json_schema": {"json_schema"}}
    if not isinstance(kind, str) or kind not in known:
        raise wrong("response_format.type", "must be text, json_object or json_schema")
    if unknown := value.keys() - known[kind] - {"type"}:
        raise wrong(f"response_format.{min(unknown)}", "is not known")
    if kind == "text":
        return None
    return '{"type":"object"}' if kind == "json_object" else _named_schema(value.get("json_schema"))


def _named_schema(value: Any) -> str:
    where = "response_format.json_schema"
    if not isinstance(value, dict):
        raise wrong(where, "must be an object with a `name` and a `schema`")
    if unknown := value.keys() - {"name", "description", "schema", "strict"}:
        raise wrong(f"{where}.{min(unknown)}", "is not known")
    check_name(value.get("name"), f"{where}.name")
    return schema_text(value.get("schema"), f"{where}.schema")


def check_name(name: Any, param: str) -> str:
    """As OpenAI names schemas and functions. Raises InvalidRequest."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong(param, "must be 1 to 64 letters, digits, underscores or dashes")
    return name


def schema_text(schema: Any, param: str) -> str:
    """Raises InvalidRequest for what is no object, or too large; not for what is no schema."""
    if not isinstance(schema, dict):
        raise wrong(param, "must be a JSON schema, an object")
    try:
        text = json.dumps(schema)
    except RecursionError:
        raise wrong(param, "is nested too deep") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise wrong(param, f"has {len(text)} bytes, over {MAX_SCHEMA_BYTES}")
    return text


def _refused(why: str, param: str) -> InvalidRequest:
    why = " ".join(why.partition("<non-verbose/>")[0].split())[:_QUOTED]
    return InvalidRequest(f"`{param}` can't be kept to: {why}", param=param, code="invalid_schema")
