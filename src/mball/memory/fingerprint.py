"""Fingerprints of memory wherever it lies, computed there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

_CHUNK_WORDS = {"cpu": 1 << 15, "cuda": 1 << 21}
"""So that what is read and what is made of it stay in the caches."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = 0xBF58476D1CE4E5B9
_WORD = (1 << 64) - 1
"""Numbers of splitmix64, all odd: multiplying by them modulo 2^64 loses nothing."""


def fingerprints(pieces: Sequence[Tensor]) -> list[int]:
    """Of vectors of int64 on one device, each as a number of 64 bits.

    Every word, and its upper half once more, is multiplied by a number of its place; what is added up of a chunk by one
    of the chunk's. A bit that flips always changes it, whatever else changes does but for one chance in about 2^64: it
    guards against accidents, not against an attacker. Takes 32 MiB beside the words at most.
    """
    device = pieces[0].device if pieces else torch.device("cpu")
    size = min(_CHUNK_WORDS[device.type], max((piece.numel() for piece in pieces), default=0))
    keys = torch.arange(size, dtype=torch.int64, device=device).mul_(_signed(_GOLDEN)).bitwise_or_(1)
    scratch = torch.empty_like(keys)
    chunks = [chunk for piece in pieces for chunk in torch.split(piece, max(1, size)) if chunk.numel()]
    sums = torch.empty(2, len(chunks), dtype=torch.int64, device=device)
    # On a GPU what takes long is to say what is to be done: 15 GiB are a thousand chunks.
    wholes, uppers = sums[0].unbind(), sums[1].unbind()
    for chunk, whole, upper in zip(chunks, wholes, uppers, strict=True):
        count = chunk.numel()
        mine, room = (keys, scratch) if count == size else (keys[:count], scratch[:count])
        torch.sum(torch.mul(chunk, mine, out=room), 0, out=whole)
        # Of changes in the upper bits alone a product shows but as many.
        torch.sum(torch.mul(_upper(chunk), mine, out=room), 0, out=upper)
    found = iter(zip(*sums.tolist(), strict=True))
    counts = [-(-piece.numel() // max(1, size)) for piece in pieces]
    return [_chained(piece.numel(), islice(found, n)) for piece, n in zip(pieces, counts, strict=True)]


def fingerprint_of(tensors: Iterable[Tensor]) -> int:
    """Of all the memory that these tensors lie in, in their order, whatever their dtypes and shapes."""
    pieces: list[Tensor] = []
    seen: set[int] = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        data = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        whole = storage.nbytes() // 8 * 8
        pieces += [data[:whole].view(torch.int64), data[whole:].to(torch.int64)]
    return _chained(len(pieces), [(found, found >> 32) for found in fingerprints(pieces)])


def _chained(length: int, sums: Iterable[tuple[int, int]]) -> int:
    total = length
    for whole, upper in sums:
        total = (total * _MIX + whole) & _WORD
        total = (total * _GOLDEN + upper) & _WORD
    return total


def _upper(words: Tensor) -> Tensor:
    return words.view(torch.int32)[1::2]


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
