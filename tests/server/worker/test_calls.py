"""Calls in a model's text, wherever the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.server.worker.call_syntax import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, QWEN_CODER, CallSyntax
from mball.server.worker.calls import CallReader

SYNTAXES = (HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, QWEN_CODER)
TOOLS: dict[str, dict[str, Any]] = {
    "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "array"}, "word": {"enum": ["5", "6"]}}},
    "time": {},
}


def read(syntax: CallSyntax, pieces: list[str], most: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """(the text, the calls' names and arguments)."""
    reader = CallReader(syntax, TOOLS, most)
    text, calls = "", []
    found = [piece for part in pieces for piece in reader.add(part)] + reader.add("", end=True)
    for piece in found:
        if isinstance(piece, str):
            text += piece
            continue
        if piece.name is not None:
            assert piece.index == len(calls)
            assert piece.id is not None
            assert syntax.id_length is None or (len(piece.id) == syntax.id_length and piece.id.isalnum())
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
CODER = """<tool_call>
<function=weather>
<parameter=city>
Köln < "x" </param

</parameter>
<parameter=days>
[1, {"a": 2}]
</parameter>
<parameter=word>5</parameter>
</function>
</tool_call>"""
CODER_ARGUMENTS = '{"city": "Köln < \\"x\\" </param\\n", "days": [1, {"a": 2}], "word": "5"}'

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
    (HERMES, "<tool_call> or " + hermes(T), "<tool_call> or ", [("time", "{}")]),
    (HERMES, f"{hermes(T)} so \n", " so \n", [("time", "{}")]),
    (MISTRAL, f"[TOOL_CALLS] [{W}, {T}]", "", [("weather", W_ARGUMENTS), ("time", "{}")]),
    (MISTRAL, f"I look.[TOOL_CALLS][{T}]\nand more", "I look.\nand more", [("time", "{}")]),
    (MISTRAL, f"[TOOL_CALLS]{T}", "", [("time", "{}")]),
    (MISTRAL, f"[TOOL_CALLS] [{RM}]", f"[TOOL_CALLS] [{RM}]", []),
    (MISTRAL, "[TOOL_CALLS] none [TOOL", "[TOOL_CALLS] none [TOOL", []),
    (MISTRAL_NAMED, f"So:[TOOL_CALLS]weather[ARGS]{W_ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}", "So:",
        [("weather", W_ARGUMENTS), ("time", "{}")]),
    (MISTRAL_NAMED, "[TOOL_CALLS]time[CALL_ID]abc[ARGS]{} and", "and", [("time", "{}")]),
    (MISTRAL_NAMED, "[TOOL_CALLS]time{}", "", [("time", "{}")]),
    (MISTRAL_NAMED, "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
    (MISTRAL_NAMED, "[TOOL_CALLS]at 5 o'clock", "[TOOL_CALLS]at 5 o'clock", []),
    (QWEN_CODER, CODER, "", [("weather", CODER_ARGUMENTS)]),
    (QWEN_CODER, f"I look.\n{CODER}\n{CODER}", "I look.\n", [("weather", CODER_ARGUMENTS)] * 2),
    (QWEN_CODER, "<tool_call><function=time>\nhm <b> </function>", "", [("time", "{}")]),
    (QWEN_CODER, "<tool_call><function=time><parameter=n>5</parameter><parameter=s>5s</parameter></function>", "",
        [("time", '{"n": 5, "s": "5s"}')]),
    (QWEN_CODER, "<tool_call><function=rm></function>", "<tool_call><function=rm></function>", []),
    (QWEN_CODER, "<tool_call>\n<func", "<tool_call>\n<func", []),
    (QWEN_CODER, "<tool_call><function=time><parameter=n>5", "", [("time", "{")]),
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


PARTS = [
    *'<{}[]",: \nx>]', *(syntax.begin for syntax in SYNTAXES), "</tool_call>", "<|python_tag|>", "[ARGS]", "time", "rm",
    "<function=", "<parameter=", "</parameter>", "</function>", "<function=time>", '"name": "time", ', "; ",
    '"arguments": {}', '"parameters": {', "time[ARGS]{}", '{"name": "time", "arguments": {}}',
]  # fmt: skip


@given(st.sampled_from(SYNTAXES), st.lists(st.sampled_from(PARTS), max_size=14).map("".join))
def test_any_text_is_read_the_same_whole_and_by_the_character(syntax: CallSyntax, answer: str) -> None:
    assert read(syntax, [answer]) == read(syntax, list(answer))


def test_arguments_go_out_as_they_come() -> None:
    reader = CallReader(HERMES, TOOLS)
    first = reader.add('<tool_call>{"name": "weather", "arguments": {"ci')
    assert [piece if isinstance(piece, str) else (piece.name, piece.arguments) for piece in first] == [
        ("weather", ""),
        (None, '{"ci'),
    ]


def test_one_call_alone_where_no_more_are_wanted() -> None:
    assert read(HERMES, [hermes(W, T) + " and"], most=1) == ("", [("weather", W_ARGUMENTS)])
    assert json.loads(W_ARGUMENTS)
