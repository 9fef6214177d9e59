"""JSON schemas in requests, as JSON text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from mball.server.worker.values import wrong

MAX_SCHEMA_BYTES = 64 * 1024
"""Such a schema, of 2,000 properties, takes 0.5 s and 2 MB to compile (measured on one core of a server)."""
MAX_MULTIPLE = 10_000
"""Numbers are kept to their multiples by a state for each remainder: these take 0.1 s, a million a minute."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


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
    _check_multiples(schema, param)
    return text


def patterns_of(schema: str) -> set[str]:
    """All that strings are kept to by a `pattern`."""
    return {value for name, value in _entries(json.loads(schema)) if name == "pattern" and isinstance(value, str)}


def _check_multiples(schema: Any, param: str) -> None:
    multiples = [
        value for name, value in _entries(schema) if name == "multipleOf" and type(value) in (int, float) and value > 0
    ]
    digits = (Decimal(str(value)).normalize().as_tuple().digits for value in multiples if math.isfinite(value))
    common = math.lcm(*(int("".join(map(str, digit))) for digit in digits))
    if common > MAX_MULTIPLE:
        raise wrong(param, f"has `multipleOf` whose digits have the common multiple {common}, over {MAX_MULTIPLE}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every name and what it has, of JSON."""
    left = [value]
    while left:
        entry = left.pop()
        if isinstance(entry, dict):
            yield from entry.items()
            left += entry.values()
        elif isinstance(entry, list):
            left += entry
