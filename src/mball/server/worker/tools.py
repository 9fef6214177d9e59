"""Tools of a request, strictly; and how the model's chat template has calls written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mball.errors import InvalidRequest
from mball.server.worker.schemas import check_name, schema_text
from mball.server.worker.structured import GUIDANCE
from mball.server.worker.values import shallow, wrong

MAX_TOOLS = 128
"""OpenAI's own limit."""

_ANY: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function: `given` is what a chat template gets, `parameters` the JSON text of the schema of its arguments."""

    name: str
    parameters: str
    strict: bool
    given: dict[str, Any]


Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`name`: this one, where `mode` is "required"."""

    mode: Choice
    name: str | None = None


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """A call is a JSON object with `name` and, under `key`, the arguments; `begin` and `end` stand around it.

    Where there is no `begin`, an answer is a call that begins as an object does, or after a `lead`.
    """

    key: str
    begin: str = ""
    end: str = ""
    lead: str = ""


HERMES = CallSyntax("arguments", begin="<tool_call>", end="</tool_call>")
"""NousResearch's, which Qwen 2.5 and 3 have too."""
LLAMA3 = CallSyntax("parameters", lead="<|python_tag|>")


def syntax_of(template: str) -> CallSyntax | None:
    """What a chat template asks the model for; None where it has no tools, or has them in a way that is not known."""
    if not re.search(r"\btools\b", template) or "<function=" in template:
        return None
    if HERMES.begin in template:
        return HERMES
    return LLAMA3 if '"parameters"' in template and "ipython" in template else None


def read_tools(value: Any) -> list[Tool]:
    """Raises InvalidRequest naming the tool and the field."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise wrong("tools", f"must be a list of at most {MAX_TOOLS} functions")
    tools = [_tool(entry, f"tools[{index}]") for index, entry in enumerate(value)]
    if len({tool.name for tool in tools}) < len(tools):
        raise wrong("tools", "has two functions of one name")
    return tools


def _tool(value: Any, where: str) -> Tool:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise wrong(f"{where}.type", "must be `function`: no other tools are run here")
    function = _object(value, where, {"type", "function"}).get("function")
    function = _object(function, f"{where}.function", {"name", "description", "parameters", "strict"})
    name = check_name(function.get("name"), f"{where}.function.name")
    description, strict = function.get("description"), function.get("strict")
    if not isinstance(description, str | None):
        raise wrong(f"{where}.function.description", "must be a text")
    if not isinstance(strict, bool | None):
        raise wrong(f"{where}.function.strict", "must be true or false")
    parameters = _ANY if function.get("parameters") is None else function["parameters"]
    text = schema_text(parameters, f"{where}.function.parameters")
    shallow(parameters, f"{where}.function.parameters")
    given = {"type": "function", "function": {"name": name, "description": description or "", "parameters": parameters}}
    return Tool(name, text, bool(strict), given)


def read_tool_choice(value: Any) -> ToolChoice:
    """Raises InvalidRequest."""
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    if not isinstance(value, dict) or value.get("type") != "function":
        raise wrong("tool_choice", "must be none, auto, required, or a function's type and name")
    function = _object(value, "tool_choice", {"type", "function"}).get("function")
    function = _object(function, "tool_choice.function", {"name"})
    return ToolChoice("required", check_name(function.get("name"), "tool_choice.function.name"))


def _object(value: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(where, "must be an object")
    if unknown := value.keys() - known:
        raise InvalidRequest(f"Unrecognized request argument supplied: {where}.{min(unknown)}", param=where)
    return value


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
    rules = [
        f"call_{n}: {json.dumps(_head(syntax, tool))} %json {_guided(tool.parameters)} {json.dumps('}')}"
        for n, tool in enumerate(tools)
    ]
    rules.append(f"one: {' | '.join(f'call_{n}' for n in range(len(tools)))}")
    begin_id = special_id(syntax.begin)
    begin = _mark(syntax.begin, begin_id)
    body = f'"\\n" one "\\n" {_mark(syntax.end, special_id(syntax.end))}' if syntax.begin else "one"
    rules.append(f"call: {begin} {body}")
    calls = 'call ("\\n" call)*' if syntax.begin and parallel else "call"
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
    return json.dumps({**json.loads(schema), "x-guidance": GUIDANCE})


def _head(syntax: CallSyntax, tool: Tool) -> str:
    return f'{{"name": "{tool.name}", "{syntax.key}": '
