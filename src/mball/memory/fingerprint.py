"""A fingerprint of memory wherever it lies, computed there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK_WORDS = {"cpu": 1 << 15, "cuda": 1 << 21}
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = 0xBF58476D1CE4E5B9 - (1 << 64)
_CHAIN = 0x94D049BB133111EB - (1 << 64)
"""Odd numbers, so that multiplying by them modulo 2^64 loses nothing (the first and the mixers of splitmix64)."""


def fingerprint(words: Tensor) -> Tensor:
    """Of a vector of int64, as an int64 without dimensions on its device.

    Every word is mixed by a number of its place, without loss, and all are added up modulo 2^64: one word that changes
    always changes the sum, and many do but for one chance in about 2^64. It guards against accidents, not against an
    attacker. Takes 64 MiB beside the words at most.
    """
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    chunk_words = _CHUNK_WORDS[words.device.type]
    places = torch.arange(min(chunk_words, words.numel()), dtype=torch.int64, device=words.device)
    keys = places.mul_(_GOLDEN).bitwise_or_(1)
    for chunk in torch.split(words, chunk_words):
        mixed = _folded(chunk)
        mixed *= keys[: chunk.numel()]
        mixed = _folded(mixed)
        mixed *= _MIX
        total = total * _CHAIN + mixed.sum() + chunk.numel()
    return total


def fingerprint_of(tensors: Iterable[Tensor]) -> int:
    """Of all the memory that these tensors lie in, in their order, whatever their dtypes and shapes."""
    found: list[Tensor] = []
    seen: set[int] = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        data = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        whole = storage.nbytes() // 8 * 8
        found.append(fingerprint(data[:whole].view(torch.int64)))
        found.append(fingerprint(data[whole:].to(torch.int64)))
    return int(fingerprint(torch.stack(found)).item()) if found else 0


def _folded(words: Tensor) -> Tensor:
    """The upper halves into the lower ones, which a multiplication spreads upwards again. Loses nothing."""
    return (words >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(words)
