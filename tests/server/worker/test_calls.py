"""Calls in a model's text, wherever the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.server.worker.calls import CallReader
from mball.server.worker.tools import HERMES, LLAMA3, CallSyntax

NAMES = {"weather", "time"}


def read(syntax: CallSyntax, pieces: list[str], most: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """(the text, the calls' names and arguments)."""
    reader = CallReader(syntax, NAMES, most)
    text, calls = "", []
    found = [piece for part in pieces for piece in reader.add(part)] + reader.add("", end=True)
    for piece in found:
        if isinstance(piece, str):
            text += piece
            continue
        if piece.name is not None:
            assert piece.index == len(calls)
            assert piece.id is not None
            calls.append([piece.name, ""])
        calls[piece.index][1] += piece.arguments
    assert reader.called == bool(calls)
    return text, [(name, arguments) for name, arguments in calls]


def hermes(*objects: str) -> str:
    return "\n".join(f"<tool_call>\n{raw}\n</tool_call>" for raw in objects)


W = '{"name": "weather", "arguments": {"city": "Köln } \\" {", "days": [1, {"a": 2}]}}'
W_ARGUMENTS = '{"city": "Köln } \\" {", "days": [1, {"a": 2}]}'
RM = '{"name": "rm", "arguments": {}}'
T = '{"arguments": {}, "name": "time"}'

CASES: list[tuple[CallSyntax, str, str, list[tuple[str, str]]]] = [
    (HERMES, "no call at all < tool", "no call at all < tool", []),
    (HERMES, hermes(W), "", [("weather", W_ARGUMENTS)]),
    (HERMES, "I look.\n" + hermes(W, T), "I look.\n", [("weather", W_ARGUMENTS), ("time", "{}")]),
    (HERMES, hermes(W) + "\nand more", "\nand more", [("weather", W_ARGUMENTS)]),
    (HERMES, "<tool_call>" + T, "", [("time", "{}")]),
    (HERMES, "<tool_call>\nnone</tool_call>", "<tool_call>\nnone</tool_call>", []),
    (HERMES, f"<tool_call>{RM}</tool_call>", f"<tool_call>{RM}</tool_call>", []),
    (HERMES, '<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
    (HERMES, "<tool_cal", "<tool_cal", []),
    (LLAMA3, W.replace("arguments", "parameters"), "", [("weather", W_ARGUMENTS)]),
    (LLAMA3, "<|python_tag|>" + T.replace("arguments", "parameters"), "", [("time", "{}")]),
    (LLAMA3, "; ".join([T.replace("arguments", "parameters")] * 2), "", [("time", "{}")] * 2),
    (LLAMA3, " It is {sunny}.", " It is {sunny}.", []),
    (LLAMA3, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA3, "{not json}. Yes", "{not json}. Yes", []),
]  # fmt: skip


@pytest.mark.parametrize(("syntax", "answer", "text", "calls"), CASES)
def test_calls_are_found(syntax: CallSyntax, answer: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(syntax, [answer]) == (text, calls)
    assert read(syntax, list(answer)) == (text, calls)


@given(st.sampled_from(CASES), st.data())
def test_where_the_text_is_cut_makes_no_difference(case: Any, data: st.DataObject) -> None:
    syntax, answer, text, calls = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(syntax, pieces) == (text, calls)


@given(st.text(alphabet='<tool_cal>/{}" \n\\name:rgumts,', max_size=120))
def test_any_text_is_read_the_same_whole_and_by_the_character(answer: str) -> None:
    for syntax in (HERMES, LLAMA3):
        assert read(syntax, [answer]) == read(syntax, list(answer))


def test_arguments_go_out_as_they_come() -> None:
    reader = CallReader(HERMES, NAMES)
    first = reader.add('<tool_call>{"name": "weather", "arguments": {"ci')
    assert [piece if isinstance(piece, str) else (piece.name, piece.arguments) for piece in first] == [
        ("weather", ""),
        (None, '{"ci'),
    ]


def test_one_call_alone_where_no_more_are_wanted() -> None:
    assert read(HERMES, [hermes(W, T) + " and"], most=1) == ("", [("weather", W_ARGUMENTS)])
    assert json.loads(W_ARGUMENTS)
