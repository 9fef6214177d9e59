"""Ids of prompts: the tokenizer's own for ordinary text, never a control token for what somebody typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from mball.errors import InvalidRequest, UnsupportedCheckpoint
from mball.server.worker.tokenizer import Tokenizer

Folder = Callable[[str], Path]
LIMIT = 10_000

ORDINARY = [
    "",
    "hello",
    " leading",
    "trailing ",
    "\n\n  both \t\n",
    "Ünïcödé wörds",
    "日本語のテキスト、改行\nあり",
    "👩‍👩‍👧 family",
    "русский текст",
    "e\u0301 combining",
    "\u200bzero width",
    "code:\n\tfor i in range(3):\n\t\tprint('<b>', i)",
    "im_start im_end < | > <| |>",
    "a" * 3000,
    "\ufffd replacement",
    "user: assistant: system:",
    "<|im_star t|> <|im_end",
]


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def chat(request: pytest.FixtureRequest, tokenizer_dir: Folder) -> tuple[Tokenizer, Any]:
    path = str(tokenizer_dir(request.param))
    return Tokenizer(path), AutoTokenizer.from_pretrained(path)


def plain_chat(reference: Any, messages: list[dict[str, str]]) -> list[int]:
    return list(reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"])


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_chats_get_the_templates_own_ids(chat: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, reference = chat
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": f"{text}!"},
        {"role": "user", "content": text},
    ]
    assert tokenizer.encode_chat(messages, LIMIT) == plain_chat(reference, messages)


@given(text=st.text(max_size=40))
def test_any_text_gets_the_templates_own_ids(chat: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, reference = chat
    assume(not any(token in text for token in reference.all_special_tokens))
    messages = [{"role": "user", "content": text}]
    assert tokenizer.encode_chat(messages, LIMIT) == plain_chat(reference, messages)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "word_piece"])
@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_prompts_get_the_tokenizers_own_ids(tokenizer_dir: Folder, kind: str, text: str) -> None:
    path = tokenizer_dir(kind)
    reference = Backend.from_file(str(path / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    assert Tokenizer(str(path)).encode(text, LIMIT) == reference.encode(text).ids


TYPED = {
    "byte_level": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "metaspace": ["<s>", "</s>", "<|user|>"],
    "word_piece": ["[SEP]", "[CLS]", "[PAD]"],
}
AROUND = ["{}", "hi {}", "{} hi", "x{}y", "{}{}", "a\n{}\nb", "  {}  ", "日本{}語", "<{}>"]


def control_ids(path: Path, tokens: list[str]) -> set[int]:
    backend = Backend.from_file(str(path / "tokenizer.json"))
    return {id for token in tokens if (id := backend.token_to_id(token)) is not None}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "word_piece"])
def test_control_tokens_in_a_prompt_stay_text(tokenizer_dir: Folder, kind: str, around: str) -> None:
    path = tokenizer_dir(kind)
    tokenizer = Tokenizer(str(path))
    controls = control_ids(path, TYPED[kind])
    beside = [id for id in tokenizer.encode("hi", LIMIT) if id in controls]
    for token in TYPED[kind]:
        text = around.replace("{}", token)
        ids = tokenizer.encode(text, LIMIT)
        assert [id for id in ids if id in controls] == beside
        if kind != "word_piece":
            assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_control_tokens_in_a_chat_stay_text(tokenizer_dir: Folder, kind: str, around: str) -> None:
    path = tokenizer_dir(kind)
    tokenizer = Tokenizer(str(path))
    controls = control_ids(path, TYPED[kind])

    def conversation(content: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": content}] * 2, LIMIT)

    expected = [id for id in conversation("plain") if id in controls]
    for token in TYPED[kind]:
        text = around.replace("{}", token)
        ids = conversation(text)
        assert [id for id in ids if id in controls] == expected
        shown = tokenizer.decode(ids)
        assert "".join(shown.split()).count("".join(text.split())) >= 2


@pytest.mark.parametrize("text", ["x</s>y", "a </s> b", "<s>ab", "ab<s></s>cd", "one\n</s>\ntwo"])
def test_no_space_is_put_beside_what_was_typed(tokenizer_dir: Folder, text: str) -> None:
    tokenizer = Tokenizer(str(tokenizer_dir("metaspace")))
    assert tokenizer.decode(tokenizer.encode(text, LIMIT)) == text


def test_a_name_stays_text_too(tokenizer_dir: Folder) -> None:
    path = tokenizer_dir("byte_level")
    tokenizer = Tokenizer(str(path))
    tokenizer._loaded.chat_template = "{% for m in messages %}{{ m['name'] + ': ' + m['content'] }}{% endfor %}"
    ids = tokenizer.encode_chat([{"role": "user", "name": "<|im_end|>", "content": "x"}], LIMIT)
    assert tokenizer.decode(ids) == "<|im_end|>: x"
    assert not set(ids) & control_ids(path, TYPED["byte_level"])


def test_what_becomes_a_control_token_only_when_normalised_is_refused(tokenizer_dir: Folder, tmp_path: Path) -> None:
    backend = Backend.from_file(str(tokenizer_dir("metaspace") / "tokenizer.json"))
    fast = AutoTokenizer.from_pretrained(tokenizer_dir("metaspace"))
    fast.add_tokens(["<tool>"], special_tokens=False)
    fast.chat_template = "<tool>{{ messages[0]['content'] }}"
    fast.save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    wide = "\uff1ctool\uff1e"
    assert backend.normalizer.normalize_str(wide) == "<tool>"
    with pytest.raises(InvalidRequest, match="control token"):
        tokenizer.encode(wide, LIMIT)
    with pytest.raises(InvalidRequest, match="control token"):
        tokenizer.encode_chat([{"role": "user", "content": wide}], LIMIT)


def test_a_template_that_refuses(tokenizer_dir: Folder) -> None:
    tokenizer = Tokenizer(str(tokenizer_dir("metaspace")))
    with pytest.raises(InvalidRequest, match="no system messages") as refused:
        tokenizer.encode_chat([{"role": "system", "content": "be good"}], LIMIT)
    assert refused.value.param == "messages"


def test_a_template_that_stumbles(tokenizer_dir: Folder) -> None:
    tokenizer = Tokenizer(str(tokenizer_dir("byte_level")))
    for template in ("{{ messages[0]['content'] + 1 }}", "{{ messages[3]['content'] + '' }}", "{{ 1 / 0 }}"):
        tokenizer._loaded.chat_template = template
        with pytest.raises(InvalidRequest, match="chat template"):
            tokenizer.encode_chat([{"role": "user", "content": "hi"}], LIMIT)


def test_what_cannot_fit_is_not_tokenised(tokenizer_dir: Folder) -> None:
    tokenizer = Tokenizer(str(tokenizer_dir("byte_level")))
    for text in ("a" * 10_000_000, "<|im_end|>" * 1_000_000):
        with pytest.raises(InvalidRequest, match="do not fit") as refused:
            tokenizer.encode(text, 100)
        assert refused.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequest, match="do not fit"):
        tokenizer.encode_chat([{"role": "user", "content": ""}] * 100_000, 100)


def test_no_template(tokenizer_dir: Folder) -> None:
    tokenizer = Tokenizer(str(tokenizer_dir("word_piece")))
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}], LIMIT)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=str(tmp_path)):
        Tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_the_bytes_of_tokens_add_up_to_the_text(tokenizer_dir: Folder, kind: str) -> None:
    tokenizer = Tokenizer(str(tokenizer_dir(kind)))
    text = "naïve 日本 👩‍👩‍👧!"
    ids = tokenizer._backend.encode(text, add_special_tokens=False).ids
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == text
