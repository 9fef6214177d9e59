"""From a request to what the engine is told."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mball.errors import InvalidRequest
from mball.server.engine.api import Generator, SamplingParams
from mball.server.worker.protocol import SamplingRequest


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the two kinds of request name differently. `max_tokens` None: as many as the context has room for."""

    max_tokens: int | None
    logprobs: int | None


def model_defaults(path: str) -> dict[str, Any]:
    """`temperature`, `top_p` and `top_k` as the model's generation_config.json has them, for requests that have not:
    what vLLM does too. What is not within a request's own bounds is left out."""
    try:
        found = json.loads((Path(path) / "generation_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    kept: dict[str, Any] = {}
    bounds: dict[str, tuple[tuple[type, ...], float]] = {
        "temperature": ((int, float), 2),
        "top_p": ((int, float), 1),
        "top_k": ((int,), 2**31),
    }
    for name, (kinds, most) in bounds.items():
        value: Any = found.get(name)
        if type(value) in kinds and 0 <= value <= most:
            kept[name] = value
    return kept


def sampling_params(
    request: SamplingRequest,
    wanted: Wanted,
    prompt_tokens: int,
    engine: Generator,
    max_logprobs: int,
    defaults: Mapping[str, Any],
) -> list[SamplingParams]:
    """One per choice of one prompt; `defaults` stand in for what was not given. Raises InvalidRequest for what this
    model cannot do."""
    max_tokens = _max_tokens(wanted.max_tokens, prompt_tokens, engine.max_model_len)
    if request.min_tokens > max_tokens:
        raise InvalidRequest(f"`min_tokens` {request.min_tokens} is over the {max_tokens} wanted", param="min_tokens")
    if wanted.logprobs is not None and wanted.logprobs > max_logprobs:
        raise InvalidRequest(f"{wanted.logprobs} logprobs wanted, over {max_logprobs}", param="logprobs")
    stop_token_ids = frozenset(_token_id(id, engine, "stop_token_ids") for id in request.stop_token_ids)
    temperature, top_p, top_k = (
        getattr(request, name) if name in request.model_fields_set else defaults.get(name, getattr(request, name))
        for name in ("temperature", "top_p", "top_k")
    )
    # OpenAI allows top_p 0: the most probable token alone.
    top_k, top_p = (1, 1.0) if top_p == 0 else (max(top_k, 0), top_p)
    logit_bias = {_token_id(id, engine, "logit_bias"): bias for id, bias in request.logit_bias.items()}
    return [
        SamplingParams(
            max_tokens=max_tokens,
            seed=choice_seed(request.seed, choice),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=logit_bias,
            logprobs=wanted.logprobs,
            stop_token_ids=stop_token_ids if request.ignore_eos else stop_token_ids | engine.eos_token_ids,
            min_tokens=request.min_tokens,
        )
        for choice in range(request.n)
    ]


def choice_seed(seed: int | None, choice: int) -> int:
    """63 bits: the same for the same seed and choice, else of the system's randomness."""
    if seed is None:
        return secrets.randbits(63)
    digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _max_tokens(wanted: int | None, prompt_tokens: int, max_model_len: int) -> int:
    room = max_model_len - prompt_tokens
    if room < 1 or (wanted is not None and wanted > room):
        asked = "" if wanted is None or room < 1 else f" and {wanted} of answer"
        raise InvalidRequest(
            f"the context is {max_model_len} tokens; {prompt_tokens} of prompt{asked} do not fit",
            code="context_length_exceeded",
            param="messages" if wanted is None else "max_tokens",
        )
    return room if wanted is None else wanted


def _token_id(value: int | str, engine: Generator, param: str) -> int:
    if isinstance(value, str) and not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise InvalidRequest(f"`{param}`: {value[:40]!r} is no token id", param=param)
    if not 0 <= int(value) < engine.vocab_size:
        raise InvalidRequest(f"`{param}`: the vocabulary has {engine.vocab_size} tokens, not {value}", param=param)
    return int(value)
