"""The model's tokenizer: text to ids, ids to text. What a user typed never becomes a control token."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mball.errors import InvalidRequest, UnsupportedCheckpoint

Ids = list[int]
Message = dict[str, Any]

_NEVER = r"(?!)"
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""A template is a program, and not every one is careful with conversations that it does not expect."""


class Tokenizer:
    """Safe in any thread: nothing here changes after the start.

    Control tokens are the special tokens, and the other added tokens that stand in the chat template's source (some
    models' role markers are not flagged special).
    """

    def __init__(self, path: str, *, trust_remote_code: bool = False) -> None:
        """Raises UnsupportedCheckpoint where the folder has no fast tokenizer."""
        try:
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UnsupportedCheckpoint(f"its tokenizer can't be read: {error}", file=path) from None
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise UnsupportedCheckpoint("it has no fast tokenizer (tokenizer.json)", file=path)
        backend.no_truncation()
        backend.no_padding()
        self._loaded = loaded
        self._backend = backend
        self.has_chat_template = loaded.chat_template is not None
        self.chat_template = _template_source(loaded)
        control = _control_tokens(loaded)
        unknown = getattr(backend.model, "unk_token", None)
        self._never_typed = frozenset(id for id, token in control.items() if token != unknown)
        longest_first = sorted(control.values(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or _NEVER)
        self._longest = max(map(len, backend.get_vocab()), default=1)
        self._prefix, self._suffix = _surroundings(backend)
        self._anchor = backend.encode("a", add_special_tokens=False).ids
        self._anchor_text = backend.decode(self._anchor, skip_special_tokens=False)
        self._before = {text: backend.encode(text, add_special_tokens=False).ids for text in ("\n", "a", ".")}
        self.decode: Callable[[Sequence[int]], str] = backend.decode
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def special_id(self, text: str) -> int | None:
        """The special token that is written so, if there is one."""
        found = self._backend.token_to_id(text)
        token = None if found is None else self._backend.get_added_tokens_decoder().get(found)
        return found if token is not None and token.special else None

    def serialized(self) -> str:
        """As tokenizer.json has it."""
        return str(self._backend.to_str())

    def encode(self, text: str, limit: int, *, special: bool = True) -> Ids:
        """A prompt's ids, where `special` with what the tokenizer itself puts around a text (BOS, [CLS] … [SEP]).

        Raises InvalidRequest for a text of more than `limit` tokens; one that is far too long is not even tokenised.
        """
        self._check_length(text, limit)
        if not self._control.search(text):
            around = len(self._prefix) + len(self._suffix) if special else 0
            return self._checked(self._backend.encode(text, add_special_tokens=special).ids, around)
        marks = _Marks(self._control)
        ids = self._encode_marked(marks.mark(text), marks)
        return [*self._prefix, *ids, *self._suffix] if special else ids

    def encode_chat(self, messages: Sequence[Message], limit: int, tools: Sequence[Message] = ()) -> Ids:
        """The ids of a conversation in the model's chat template, with the tools that it is told of, open for the
        assistant's turn.

        Raises InvalidRequest where the model has no template, its template refuses the conversation, or there are
        more than `limit` tokens for certain.
        """
        if not self.has_chat_template:
            raise InvalidRequest("the model has no chat template; use /v1/completions", param="messages")
        given: list[list[Any]] = [list(messages), list(tools)]
        marks = _Marks(self._control) if any(map(self._control.search, _texts(given))) else None
        conversation, told = [marks.marked(value) for value in given] if marks else given
        try:
            text = str(
                self._loaded.apply_chat_template(
                    conversation, tools=told or None, tokenize=False, add_generation_prompt=True
                )
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(f"the model's chat template refuses: {error}", param="messages") from None
        self._check_length(text, limit)
        return self._whole(text) if marks is None else self._encode_marked(text, marks)

    def _check_length(self, text: str, limit: int) -> None:
        if len(text) > limit * self._longest:
            raise InvalidRequest(
                f"the context is {limit} tokens; {len(text)} characters do not fit", code="context_length_exceeded"
            )

    def _encode_marked(self, text: str, marks: _Marks) -> Ids:
        pieces = marks.split(text)
        ids = self._whole(pieces[0] or "")
        for index, piece in enumerate(pieces[1:], 1):
            if piece:
                ids += self._inside(piece, self._plain if index % 2 else self._whole)
        return ids

    def _whole(self, text: str) -> Ids:
        """Ids as the tokenizer gives them: control tokens are found."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return self._checked(ids, len(self._control.findall(text)))

    def _plain(self, text: str) -> Ids:
        """Ids of the tokenizer's own steps without the search for added tokens."""
        normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
        normal = normalizer.normalize_str(text) if normalizer is not None else text
        words = [word for word, _ in splitter.pre_tokenize_str(normal)] if splitter is not None else [normal]
        return self._checked([token.id for word in words for token in self._backend.model.tokenize(word)], 0)

    def _inside(self, text: str, encode: Callable[[str], Ids]) -> Ids:
        """A piece from the middle of a text: tokenizers that put a space before a text must not put one here."""
        for before, head in self._before.items():
            ids = encode(before + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return encode(text)

    def _checked(self, ids: Ids, allowed: int) -> Ids:
        # A normaliser may turn other characters into a control token's own.
        if sum(id in self._never_typed for id in ids) > allowed:
            raise InvalidRequest("the text holds characters that this model's tokenizer reads as a control token")
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """All of it, control tokens too."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def strings(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return [self._backend.id_to_token(token) or "" for token in ids]

    def token_text(self, token_id: int) -> str:
        """The token alone; U+FFFD stands for bytes that are no whole character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes([int(match[1], 16)])
        # After another token: some decoders strip the space before a text's first word.
        text = self._backend.decode([*self._anchor, token_id], skip_special_tokens=False)[len(self._anchor_text) :]
        if "\ufffd" in text and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return text.encode()


class _Marks:
    """Brackets around control tokens in users' text that nobody can guess, so that the template's own stand out."""

    def __init__(self, control: re.Pattern[str]) -> None:
        nonce = secrets.token_hex(8)
        self._open, self._close = f"\u2045{nonce}\u2044", f"\u2044{nonce}\u2046"
        self._control = control
        # A template that cuts a text may leave a bracket alone; it still parts what stands on its two sides.
        self._split = re.compile(f"{self._open}({control.pattern}){self._close}|{self._open}|{self._close}")

    def mark(self, text: str) -> str:
        return self._control.sub(f"{self._open}\\g<0>{self._close}", text)

    def marked(self, value: Any) -> Any:
        """With every text in it marked."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, dict):
            return {self.mark(key): self.marked(entry) for key, entry in value.items()}
        return [self.marked(entry) for entry in value] if isinstance(value, list) else value

    def split(self, text: str) -> list[str | None]:
        """[text, typed control token or None, text, …]."""
        return self._split.split(text)


def _texts(value: Any) -> Iterator[str]:
    """Every text in JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _template_source(loaded: PreTrainedTokenizerBase) -> str:
    templates = loaded.chat_template
    return "\0".join(templates.values()) if isinstance(templates, dict) else templates or ""


def _control_tokens(loaded: PreTrainedTokenizerBase) -> dict[int, str]:
    source = _template_source(loaded)
    return {
        id: token.content
        for id, token in loaded.added_tokens_decoder.items()
        if token.special or (token.content in source and not token.content.isspace())
    }


def _surroundings(backend: Backend) -> tuple[Ids, Ids]:
    """The ids that the tokenizer puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    dressed = backend.encode("a").ids
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start], dressed[start + len(bare) :]
    return [], []


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (GPT-2's table: printable bytes as themselves)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
