"""Attention over the paged KV cache, as an implementation that transformers' models choose by name.

All tokens of a step stand in one row, (1, num_tokens): first one token of each decoding sequence, then the chunks of
the prompts. Which token belongs to which sequence is in the `Batch` that the step's thread has entered; models pass
nothing through. Registered as `mball_paged` with transformers' `AttentionInterface`, and with no mask function: then
models build no mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "mball_paged"


@dataclass(slots=True)
class Decode:
    """One new token for each of `num_seqs` sequences.

    `blocks` are the sequences' block numbers, (num_seqs × max_blocks), padded with the null block; `kv_lens` the
    tokens each attends to, the new one included.
    """

    num_seqs: int
    blocks: Tensor
    kv_lens: Tensor
    max_kv_len: int
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, length: int, window: int | None, like: Tensor) -> Tensor | None:
        """An additive mask (num_seqs, 1, 1, length); None where nothing is masked. Made once a step."""
        if window not in self.masks:
            if self.num_seqs == 1 and (window is None or self.max_kv_len <= window):
                self.masks[window] = None
            else:
                at = torch.arange(length, device=like.device)[None]
                seen = at < self.kv_lens[:, None]
                if window is not None:
                    seen &= at >= self.kv_lens[:, None] - window
                self.masks[window] = _additive(seen, like)[:, None, None]
        return self.masks[window]


@dataclass(slots=True)
class Prefill:
    """`count` tokens of one sequence from row `start` on, after `context` tokens that are in the cache already.

    `blocks` are the sequence's block numbers up to the chunk's end; None where there is no context to read.
    """

    start: int
    count: int
    context: int
    blocks: Tensor | None
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """An additive mask (count, context + count); None for plain causal attention from the start."""
        if window is not None and self.context + self.count <= window:
            window = None
        if window not in self.masks:
            if window is None and self.context == 0:
                self.masks[window] = None
            else:
                query = torch.arange(self.context, self.context + self.count, device=like.device)[:, None]
                key = torch.arange(self.context + self.count, device=like.device)[None]
                seen = key <= query
                if window is not None:
                    seen &= key > query - window
                self.masks[window] = _additive(seen, like)
        return self.masks[window]


@dataclass(slots=True)
class Batch:
    """The tokens of one step. `layers` are the cache's (keys, values), each (num_blocks, block_size, heads, dim);
    token i's own key and value go to block `write_blocks[i]`, place `write_places[i]`."""

    layers: list[tuple[Tensor, Tensor]]
    write_blocks: Tensor
    write_places: Tensor
    decode: Decode | None
    prefills: list[Prefill]


_current: ContextVar[Batch] = ContextVar("mball_batch")


@contextlib.contextmanager
def entered(batch: Batch) -> Iterator[None]:
    """Attention in this thread works on `batch`."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (1, num_heads, num_tokens, head_dim), key and value (1, num_kv_heads, num_tokens, head_dim) →
    (1, num_tokens, num_heads, head_dim). The signature is transformers'."""
    batch = _current.get()
    keys, values = batch.layers[module.layer_idx]  # type: ignore[index]
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    where = (batch.write_blocks, batch.write_places)
    keys.index_put_(where, key)
    values.index_put_(where, value)
    decode, prefills = batch.decode, batch.prefills
    if decode is not None:
        output = _decode(decode, query[: decode.num_seqs], keys, values, scaling, sliding_window, softcap)
        if not prefills:
            return output[None], None
        parts = [output]
    else:
        parts = []
    for prefill in prefills:
        rows = slice(prefill.start, prefill.start + prefill.count)
        if prefill.blocks is None:
            k, v = key[rows], value[rows]
        else:
            k, v = (_gather(pool, prefill.blocks, prefill.context + prefill.count) for pool in (keys, values))
        parts.append(_prefill(prefill, query[rows], k, v, scaling, sliding_window, softcap))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _decode(
    decode: Decode,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[2]
    k = keys.index_select(0, decode.blocks).view(num_seqs, -1, num_kv_heads, head_dim)
    v = values.index_select(0, decode.blocks).view(num_seqs, -1, num_kv_heads, head_dim)
    # One sequence, or many of one length, read no more than is theirs: alone, nothing depends on padding.
    k, v = k[:, : decode.max_kv_len].transpose(1, 2), v[:, : decode.max_kv_len].transpose(1, 2)
    # The query heads that share a key head stand where a longer query's tokens would: keys are never repeated.
    query = query.reshape(num_seqs, num_kv_heads, -1, head_dim)
    mask = decode.mask(decode.max_kv_len, window, query)
    return _attend(query, k, v, mask, False, scaling, softcap).reshape(num_seqs, num_heads, head_dim)


def _prefill(
    prefill: Prefill,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    count, num_heads, head_dim = query.shape
    length, num_kv_heads, _ = key.shape
    group = num_heads // num_kv_heads
    query = query.transpose(0, 1).view(num_kv_heads, group, count, head_dim)
    key = key.transpose(0, 1)[:, None].expand(num_kv_heads, group, length, head_dim)
    value = value.transpose(0, 1)[:, None].expand(num_kv_heads, group, length, head_dim)
    mask = prefill.mask(window, query)
    output = _attend(query, key, value, mask, mask is None, scaling, softcap)
    return output.reshape(num_heads, count, head_dim).transpose(0, 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    if softcap is None:
        causal = causal and query.shape[2] > 1
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = _additive(torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(), scores)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _gather(pool: Tensor, blocks: Tensor, length: int) -> Tensor:
    return pool.index_select(0, blocks).flatten(0, 1)[:length]


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
