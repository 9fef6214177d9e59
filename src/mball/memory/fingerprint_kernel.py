"""What `fingerprint` adds up, in one pass over a GPU's memory. Imported only where there is Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from mball.errors import DeviceError
from mball.memory.fingerprint import GOLDEN

_BLOCK_WORDS = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(words, sums, count, CHUNK: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    word = tl.load(words + at, mask=at < count, other=0)
    key = ((at % CHUNK) * KEY) | 1
    chunk = sums + 2 * (first // CHUNK)
    # Whatever the order, modulo 2^64 it comes to the same.
    tl.atomic_add(chunk, tl.sum(word * key))
    tl.atomic_add(chunk + 1, tl.sum((word >> 32) * key))


def add_up_in_one_pass(pieces: Sequence[Tensor], chunk_words: int) -> Tensor:
    """As `add_up_chunks`; `chunk_words` is a multiple of 4096. Raises DeviceError where Triton makes none."""
    counts = [-(-piece.numel() // chunk_words) for piece in pieces]
    sums = torch.zeros(sum(counts), 2, dtype=torch.int64, device=pieces[0].device)
    try:
        for piece, into in zip(pieces, torch.split(sums, counts), strict=True):
            if blocks := -(-piece.numel() // _BLOCK_WORDS):
                _add_up[(blocks,)](piece, into, piece.numel(), chunk_words, GOLDEN, _BLOCK_WORDS, num_warps=8)
    except TritonError as error:
        raise DeviceError(f"Triton: {error}") from error
    return sums
