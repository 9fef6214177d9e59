"""Text as it comes: the same as all at once, and never half a character."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.server.worker.detokenizer import Detokenizer
from mball.server.worker.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def codec(request: pytest.FixtureRequest, tokenizer_dir: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer(str(tokenizer_dir(request.param)))


def pieces(codec: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(codec.decode, prompt)
    return [*(detokenizer.add(id) for id in ids), detokenizer.flush()]


def bare_ids(codec: Tokenizer, text: str) -> list[int]:
    return list(codec._backend.encode(text, add_special_tokens=False).ids)


@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=("Cs",)), max_size=60))
def test_the_pieces_make_the_text(codec: Tokenizer, text: str) -> None:
    ids = bare_ids(codec, text)
    given_out = pieces(codec, ids, [])
    assert "".join(given_out) == codec.decode(ids)
    assert not any("\ufffd" in piece for piece in given_out)


def test_a_character_of_four_bytes_comes_whole(codec: Tokenizer) -> None:
    ids = bare_ids(codec, "a\U0001f9ff")
    given_out = pieces(codec, ids, [])
    assert len(ids) > 3
    assert "\U0001f9ff" in given_out
    assert given_out[-1] == ""


def test_the_space_before_the_first_word_is_kept_after_a_prompt(tokenizer_dir: Callable[[str], Path]) -> None:
    codec = Tokenizer(str(tokenizer_dir("metaspace")))
    whole = bare_ids(codec, "The quick brown fox")
    prompt, rest = whole[:2], whole[2:]
    assert codec.decode(prompt) + "".join(pieces(codec, rest, prompt)) == "The quick brown fox"


def test_broken_bytes_come_out_in_the_end(codec: Tokenizer) -> None:
    half = bare_ids(codec, "\U0001f9ff")[-4:-1]
    assert codec.decode(half).endswith("\ufffd")
    assert "\ufffd" in "".join(pieces(codec, half, []))
    # Endless garbage is not held back for ever, and costs no more with its length.
    lengths: list[int] = []

    def decode(ids: object) -> str:
        lengths.append(len(ids))  # type: ignore[arg-type]
        return codec.decode(ids)  # type: ignore[arg-type]

    detokenizer = Detokenizer(decode, [])
    text = "".join(detokenizer.add(half[0]) for _ in range(200))
    assert text.count("\ufffd") > 150
    assert max(lengths) < 20


def test_a_prompt_that_ends_inside_a_character(codec: Tokenizer) -> None:
    ids = bare_ids(codec, "ok \U0001f9ff fine")
    cut = next(n for n in range(1, len(ids)) if codec.decode(ids[:n]).endswith("\ufffd"))
    assert "".join(pieces(codec, ids[cut:], ids[:cut])).endswith(" fine")


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, [1, *bare_ids(tokenizer, "hi"), 0], []) == [
        "",
        *pieces(tokenizer, bare_ids(tokenizer, "hi"), [])[:-1],
        "",
        "",
    ]
