"""Tools of a request, strictly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mball.errors import InvalidRequest
from mball.server.worker.schemas import check_name, schema_text
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
