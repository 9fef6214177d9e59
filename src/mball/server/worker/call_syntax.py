"""How models write calls of tools: what their chat templates say of it, and the grammar of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mball.server.worker.structured import GUIDANCE
from mball.server.worker.tools import Tool


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """`begin` and `end` stand around a call, or around several with `between` (any of its characters) between them.

    A call of the form "object" is a JSON object with `name` and, under `key`, the arguments; one of the form "named"
    has the name, `key` and then the arguments; one of the form "tagged" is Qwen3-Coder's, a tag for each argument.
    Where there is no `begin`, an answer is a call that begins as an object does. A `lead` may stand before it.
    """

    form: Literal["object", "named", "tagged"]
    key: str = ""
    begin: str = ""
    end: str = ""
    lead: str = ""
    between: str = ""
    id_length: int | None = None
    """Of a call's id, where the template takes no other."""


HERMES = CallSyntax("object", "arguments", begin="<tool_call>", end="</tool_call>")
"""NousResearch's, which Qwen 2.5 and 3 have too."""
LLAMA3 = CallSyntax("object", "parameters", lead="<|python_tag|>", between=";")
MISTRAL = CallSyntax("object", "arguments", begin="[TOOL_CALLS]", lead="[", end="]", between=",", id_length=9)
"""A list of calls."""
MISTRAL_NAMED = CallSyntax("named", "[ARGS]", begin="[TOOL_CALLS]", id_length=9)
"""Of Mistral's models since 2025 (their tokenizers' version 11)."""
QWEN_CODER = CallSyntax("tagged", begin="<tool_call>", end="</tool_call>")

KNOWN = "Hermes' and Qwen's <tool_call>, Qwen3-Coder's <function=…>, Llama 3's JSON, Mistral's [TOOL_CALLS]"


def syntax_of(template: str) -> CallSyntax | None:
    """What a chat template asks the model for; None where it has no tools, or has them in a way that is not known."""
    if not re.search(r"\btools\b", template):
        return None
    if "<function=" in template:
        return QWEN_CODER if "<parameter=" in template else None
    if HERMES.begin in template:
        return HERMES
    if MISTRAL.begin in template:
        return MISTRAL_NAMED if MISTRAL_NAMED.key in template else MISTRAL
    return LLAMA3 if '"parameters"' in template and "ipython" in template else None


def grammar_of(
    syntax: CallSyntax,
    tools: Sequence[Tool],
    special_id: Callable[[str], int | None],
    *,
    forced: bool,
    parallel: bool,
    otherwise: str | None = None,
) -> str:
    """The answers that have calls of these tools alone, as a grammar of llguidance: where they are not `forced` text
    too, or JSON of the schema `otherwise`. `special_id` of a text is the special token that is written so.

    Each function's schema is one of its own, so that its references stay within it.
    """
    rules = [rule for n, tool in enumerate(tools) for rule in _rules(syntax, tool, f"call_{n}", special_id)]
    rules.append(f"one: {' | '.join(f'call_{n}' for n in range(len(tools)))}")
    begin_id = special_id(syntax.begin)
    begin = _mark(syntax.begin, begin_id)
    if syntax is MISTRAL:
        body = '"[" one (", " one)* "]"' if parallel else '"[" one "]"'
    elif syntax.end:
        body = f'"\\n" one "\\n" {_mark(syntax.end, special_id(syntax.end))}'
    else:
        body = "one"
    rules.append(f"call: {begin} {body}")
    glue = '"\\n"' if syntax.end else ""
    calls = f"call ({glue} call)*" if syntax.begin and syntax is not MISTRAL and parallel else "call"
    if forced:
        start = calls
    elif otherwise is not None:
        start = f"{calls} | free"
        rules.append(f"free: %json {_guided(otherwise)}")
    elif syntax.begin:
        start = f"said{'*' if parallel else '?'} TEXT"
        lazy = "[lazy]" if begin_id is None else ""
        rules += [f"said: head {body}", f"head{lazy}: TEXT {begin}", "TEXT: /(.|\\n)*/"]
    else:
        start = "call | FREE"
        rules.append("FREE: /([^{](.|\\n)*)?/")
    return "\n".join([f"start: {start}", *rules])


def _mark(text: str, token_id: int | None) -> str:
    if not text:
        return ""
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _guided(schema: str) -> str:
    found = json.loads(schema)
    return json.dumps({**found, "x-guidance": GUIDANCE} if isinstance(found, dict) else found)


def _rules(syntax: CallSyntax, tool: Tool, name: str, special_id: Callable[[str], int | None]) -> list[str]:
    """Of the calls of one tool; the first of them has the name."""
    if syntax.form == "tagged":
        return _tagged(tool, name)
    guided = f"%json {_guided(tool.parameters)}"
    if syntax.form == "named":
        return [f"{name}: {json.dumps(tool.name)} {_mark(syntax.key, special_id(syntax.key))} {guided}"]
    head = f'{{"name": "{tool.name}", "{syntax.key}": '
    return [f"{name}: {json.dumps(head)} {guided} {json.dumps('}')}"]


def _tagged(tool: Tool, name: str) -> list[str]:
    """Strings are texts without quotes, up to their end tag: of their schemas `enum` and `const` are kept."""
    schema = json.loads(tool.parameters)
    shared = {entry: schema[entry] for entry in ("$defs", "definitions") if entry in schema}
    required = schema.get("required") or []
    rules, parts = [], []
    for n, (parameter, kept) in enumerate(properties_of(schema).items()):
        head, tail = json.dumps(f"<parameter={parameter}>\n"), json.dumps("\n</parameter>\n")
        rule = f"{name}_{n}"
        if not is_text(kept):
            guided = _guided(json.dumps({**shared, **kept} if isinstance(kept, dict) else kept))
            rules.append(f"{rule}: {head} %json {guided} {tail}")
        elif words := kept.get("enum", [kept["const"]] if "const" in kept else []):
            rules.append(f"{rule}: {head} ({' | '.join(map(json.dumps, words))}) {tail}")
        else:
            rules.append(f"{rule}[lazy]: {head} /(.|\\n)*/ {tail}")
        parts.append(rule if parameter in required else f"{rule}?")
    head, tail = json.dumps(f"<function={tool.name}>\n"), json.dumps("</function>")
    return [f"{name}: {' '.join([head, *parts, tail])}", *rules]


def properties_of(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema for each argument."""
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def is_text(schema: Any) -> bool:
    """Whether what it describes is a string and nothing else."""
    if not isinstance(schema, dict):
        return False
    words = schema.get("enum", [schema["const"]] if "const" in schema else [])
    kind = schema.get("type", "string" if words else None)
    return kind == "string" and isinstance(words, list) and all(isinstance(word, str) for word in words)
