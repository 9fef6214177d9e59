"""One forward pass: the scheduler's chunks as tensors, through the model, to logits of the rows that are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mball.server.engine import attention
from mball.server.engine.kv_cache import NULL_BLOCK, KVCache
from mball.server.engine.scheduler import Chunk


def forward(
    module: torch.nn.Module,
    cache: KVCache,
    chunks: Sequence[Chunk[Any]],
    logit_rows: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Compute the chunks, those of one token first, and write their keys and values.

    `logit_rows` are indices among the step's tokens; returns (len(logit_rows), vocab_size).
    """
    input_ids: list[int] = []
    positions: list[int] = []
    write_blocks: list[int] = []
    size = cache.block_size
    for chunk in chunks:
        cache.clear(chunk.new_blocks)
        sequence, end = chunk.sequence, chunk.start + chunk.count
        input_ids += sequence.tokens[chunk.start : end]
        positions += range(chunk.start, end)
        write_blocks += [sequence.blocks[position // size] for position in range(chunk.start, end)]
    at = torch.tensor(positions, device=device)
    batch = attention.Batch(
        layers=cache.layers,
        write_blocks=torch.tensor(write_blocks, device=device),
        write_places=at % size,
        decode=_decode([chunk for chunk in chunks if chunk.count == 1], size, device),
        prefills=_prefills(chunks, size, device),
    )
    with attention.entered(batch):
        logits: Tensor = module(
            input_ids=torch.tensor([input_ids], device=device),
            position_ids=at[None],
            use_cache=False,
            logits_to_keep=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        ).logits
    return logits[0]


def _decode(chunks: Sequence[Chunk[Any]], block_size: int, device: torch.device) -> attention.Decode | None:
    if not chunks:
        return None
    lengths = [chunk.start + 1 for chunk in chunks]
    width = -(-max(lengths) // block_size)
    blocks: list[int] = []
    for chunk, length in zip(chunks, lengths, strict=True):
        own = chunk.sequence.blocks[: -(-length // block_size)]
        blocks += own
        blocks += [NULL_BLOCK] * (width - len(own))
    return attention.Decode(
        num_seqs=len(chunks),
        blocks=torch.tensor(blocks, device=device),
        kv_lens=torch.tensor(lengths, device=device),
        max_kv_len=max(lengths),
    )


def _prefills(chunks: Sequence[Chunk[Any]], block_size: int, device: torch.device) -> list[attention.Prefill]:
    prefills = []
    row = 0
    for chunk in chunks:
        if chunk.count > 1:
            blocks = None
            if chunk.start > 0:
                num_blocks = -(-(chunk.start + chunk.count) // block_size)
                blocks = torch.tensor(chunk.sequence.blocks[:num_blocks], device=device)
            prefills.append(attention.Prefill(row, chunk.count, chunk.start, blocks))
        row += chunk.count
    return prefills
