"""Draws the next token of every sequence of a batch, each with its own parameters.

Drawing is Gumbel-max: the token with the largest logit / temperature + noise, which is a draw from the softmax (e.g.
Maddison, Tarlow, Minka: A* Sampling, 2014). The noise of a token is a hash of (seed, position, token id) and nothing
else, so a seeded sequence meets the same noise in any batch, after any preemption and after any swap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mball.server.engine.api import Logprob, SamplingParams
from mball.server.engine.grammar import Grammar

_MASK64 = (1 << 64) - 1
_GREEDY_BELOW = 1e-5
_CANDIDATES = 1024
"""How many of the largest logits are looked at first for top_k and top_p; a row that needs more is sorted whole."""


@dataclass(slots=True)
class Row:
    """One sequence that draws a token. `position` is the index that the new token will have.

    `counts` says how often each token stands in the output so far (kept only where a penalty needs it). A `grammar`
    allows what is drawn.
    """

    params: SamplingParams
    position: int
    num_output: int
    counts: dict[int, int] = field(default_factory=dict)
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, and its log probabilities where they were asked for. `token_id` is None where the logits held NaN."""

    token_id: int | None
    logprob: Logprob | None = None
    top_logprobs: tuple[Logprob, ...] = ()


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Drawn]:
    """One draw per row of `logits`, (len(rows), vocab_size), any float dtype; they are not changed."""
    raw = logits.float()
    best, greedy_ids = raw.max(-1)
    tokens = greedy_ids
    adjusted = _constrain(_adjust(raw, rows), rows)
    if adjusted is not raw:
        tokens = adjusted.argmax(-1)
    drawing = [index for index, row in enumerate(rows) if row.params.temperature > _GREEDY_BELOW]
    if drawing:
        subset = adjusted if len(drawing) == len(rows) else adjusted[drawing]
        drawn = _draw(subset, [rows[index] for index in drawing])
        tokens = tokens.index_copy(0, torch.tensor(drawing, device=tokens.device), drawn)
    token_ids, finite = tokens.tolist(), best.isfinite().tolist()
    results = [Drawn(token if good else None) for token, good in zip(token_ids, finite, strict=True)]
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None and finite[i]]
    if wanted:
        counts = [rows[index].params.logprobs or 0 for index in wanted]
        chosen = [token_ids[index] for index in wanted]
        found = logprobs(raw if len(wanted) == len(rows) else raw[wanted], chosen, counts)
        for index, (own, top) in zip(wanted, found, strict=True):
            results[index] = Drawn(own.token_id, own, top)
    return results


def logprobs(
    logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[tuple[Logprob, tuple[Logprob, ...]]]:
    """For each row, log p of its token and of its `counts[i]` likeliest tokens, under the softmax of the logits."""
    logits = logits.float()
    norm = logits.logsumexp(-1)
    own = logits.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0] - norm
    own_values = own.tolist()
    width = min(max(counts), logits.shape[-1])
    values, ids = logits.topk(width, dim=-1)
    top_values, top_ids = (values - norm[:, None]).tolist(), ids.tolist()
    result = []
    for row, (token, count) in enumerate(zip(token_ids, counts, strict=True)):
        top = tuple(Logprob(i, value) for i, value in zip(top_ids[row][:count], top_values[row][:count], strict=True))
        result.append((Logprob(token, own_values[row]), top))
    return result


def _adjust(raw: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits with bias, penalties and, before `min_tokens`, without stop tokens; `raw` itself where no row has any."""
    at_rows: list[int] = []
    at_tokens: list[int] = []
    deltas: list[float] = []
    for index, row in enumerate(rows):
        params = row.params
        if params.logit_bias:
            at_rows += [index] * len(params.logit_bias)
            at_tokens += params.logit_bias.keys()
            deltas += params.logit_bias.values()
        if row.counts and (params.presence_penalty or params.frequency_penalty):
            at_rows += [index] * len(row.counts)
            at_tokens += row.counts.keys()
            deltas += [-params.presence_penalty - params.frequency_penalty * count for count in row.counts.values()]
        if row.num_output < params.min_tokens:
            at_rows += [index] * len(params.stop_token_ids)
            at_tokens += params.stop_token_ids
            deltas += [float("-inf")] * len(params.stop_token_ids)
    if not deltas:
        return raw
    where = (torch.tensor(at_rows, device=raw.device), torch.tensor(at_tokens, device=raw.device))
    return raw.index_put(where, torch.tensor(deltas, device=raw.device), accumulate=True)


def _constrain(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits without the tokens that a row's grammar forbids; `logits` itself where no row has one."""
    bound = [(index, row.grammar) for index, row in enumerate(rows) if row.grammar is not None]
    if not bound:
        return logits
    allowed = np.stack([grammar.allowed(logits.shape[-1]) for _, grammar in bound])
    at = torch.tensor([index for index, _ in bound], device=logits.device)
    forbidden = torch.from_numpy(~allowed).to(logits.device)
    return logits.index_copy(0, at, logits[at].masked_fill(forbidden, float("-inf")))


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Token ids, (len(rows),)."""
    temperature = torch.tensor([row.params.temperature for row in rows], device=logits.device)[:, None]
    logits = logits / temperature
    keys = _keys(rows, logits.device)
    vocab_size = logits.shape[-1]
    filtered = [i for i, row in enumerate(rows) if row.params.top_p < 1 or 0 < row.params.top_k < vocab_size]
    if len(filtered) == len(rows):
        return _draw_filtered(logits, keys, rows)
    all_ids = torch.arange(vocab_size, dtype=torch.int32, device=logits.device)
    if not filtered:
        return (gumbel(keys, all_ids).add_(logits)).argmax(-1)
    plain = [i for i in range(len(rows)) if i not in set(filtered)]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    tokens[plain] = gumbel(keys[plain], all_ids).add_(logits[plain]).argmax(-1)
    tokens[filtered] = _draw_filtered(logits[filtered], keys[filtered], [rows[i] for i in filtered])
    return tokens


def _draw_filtered(logits: Tensor, keys: Tensor, rows: Sequence[Row]) -> Tensor:
    """top_k first, then top_p over what top_k left. Equal logits at a bound share its fate, so no order of sorting
    shows in the result."""
    vocab_size = logits.shape[-1]
    top_ks = [row.params.top_k if 0 < row.params.top_k < vocab_size else vocab_size for row in rows]
    top_k = torch.tensor(top_ks, device=logits.device)[:, None]
    top_p = torch.tensor([row.params.top_p for row in rows], device=logits.device)[:, None]
    width = vocab_size if any(_CANDIDATES < k < vocab_size for k in top_ks) else min(_CANDIDATES, vocab_size)
    while True:
        values, ids = logits.topk(width, dim=-1)
        kept = values >= values.gather(-1, (top_k - 1).clamp(max=width - 1))
        # The mass that top_p counts is that of top_k's survivors: the whole row's where top_k is off.
        limited = top_k < vocab_size
        norm = torch.where(
            limited, values.masked_fill(~kept, float("-inf")).logsumexp(-1, True), logits.logsumexp(-1, True)
        )
        before = (values - norm).exp().masked_fill_(~kept, 0).cumsum(-1)
        before = before.roll(1, -1)
        before[:, 0] = 0
        last = ((before < top_p) & kept).sum(-1, keepdim=True).clamp(min=1) - 1
        bound = values.gather(-1, last)
        # Whatever lies beyond the candidates matters only where the bound is the last of them.
        if width == vocab_size or bool((bound > values[:, -1:]).all()):
            break
        width = vocab_size
    scores = (gumbel(keys, ids) + values).masked_fill_(values < bound, float("-inf"))
    return ids.gather(-1, scores.argmax(-1, keepdim=True))[:, 0]


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise, float32 (rows, tokens). `keys` (rows, 2) int32; `token_ids` (tokens,) or (rows, tokens).

    A 32-bit mix (the multipliers are of https://github.com/skeeto/hash-prospector) with half of the key before and
    half inside; its upper 24 bits are the uniform number.
    """
    x = token_ids.to(torch.int32) * -1640531527 + keys[:, :1]
    x = _xor_shift(x, 16).mul_(0x21F0AAAD).bitwise_xor_(keys[:, 1:])
    x = _xor_shift(x, 15).mul_(0x735A2D97)
    x = _xor_shift(x, 15)
    uniform = x.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
    # The largest rounds up to 1, whose noise is infinite: it would draw that token whatever the logits say.
    uniform.clamp_(max=1.0 - 2.0**-24)
    return uniform.log_().neg_().log_().neg_()


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    # int32 shifts keep the sign: the mask makes the shift a logical one.
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _keys(rows: Sequence[Row], device: torch.device) -> Tensor:
    halves = []
    for row in rows:
        # SplitMix64's finaliser over the seed, then over the position.
        key = _mix64(_mix64(row.params.seed & _MASK64) + row.position)
        halves.append([_signed32(key), _signed32(key >> 32)])
    return torch.tensor(halves, dtype=torch.int32, device=device)


def _mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x
