"""Fingerprints of memory wherever it lies, computed there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from mball.errors import DeviceError
from mball.loader.ring import warn_once

_CHUNK_WORDS = {"cpu": 1 << 15, "cuda": 1 << 21}
"""So that what is read and what is made of it stay in the caches."""

_WORD = (1 << 64) - 1
_MIX = 0xBF58476D1CE4E5B9
_CHAIN = 0x9E3779B97F4A7C15
GOLDEN = _CHAIN - (1 << 64)
"""Numbers of splitmix64, all odd: multiplying by them modulo 2^64 loses nothing. The last one as int64 has it."""

AddUp = Callable[[Sequence[Tensor], int], Tensor]


def fingerprints(pieces: Sequence[Tensor]) -> list[int]:
    """Of vectors of int64 on one device, each as a number of 64 bits.

    Every word, and its upper half once more, is multiplied by a number of its place; what is added up of a chunk by one
    of the chunk's. A bit that flips always changes it, whatever else changes does but for one chance in about 2^64: it
    guards against accidents, not against an attacker. Takes 32 MiB beside the words at most.
    """
    device = pieces[0].device if pieces else torch.device("cpu")
    add_up = _in_one_pass(device) if device.type == "cuda" else None
    chunk_words = _CHUNK_WORDS[device.type]
    sums = (add_up or add_up_chunks)(pieces, chunk_words)
    found = iter(sums.tolist())
    return [_chained(piece.numel(), islice(found, -(-piece.numel() // chunk_words))) for piece in pieces]


def add_up_chunks(pieces: Sequence[Tensor], chunk_words: int) -> Tensor:
    """[chunks of all the pieces, 2], int64: the sums of the words and of their upper halves."""
    device = pieces[0].device if pieces else torch.device("cpu")
    size = min(chunk_words, max((piece.numel() for piece in pieces), default=0))
    keys = torch.arange(size, dtype=torch.int64, device=device).mul_(GOLDEN).bitwise_or_(1)
    scratch = torch.empty_like(keys)
    chunks = [chunk for piece in pieces for chunk in torch.split(piece, max(1, size)) if chunk.numel()]
    sums = torch.empty(len(chunks), 2, dtype=torch.int64, device=device)
    for chunk, whole, upper in zip(chunks, sums[:, 0].unbind(), sums[:, 1].unbind(), strict=True):
        count = chunk.numel()
        mine, room = (keys, scratch) if count == size else (keys[:count], scratch[:count])
        torch.sum(torch.mul(chunk, mine, out=room), 0, out=whole)
        # Of changes in the upper bits alone a product shows but as many.
        torch.sum(torch.mul(_upper(chunk), mine, out=room), 0, out=upper)
    return sums


@cache
def _in_one_pass(device: torch.device) -> AddUp | None:
    """A kernel for a GPU, where Triton and what it compiles with are there, and it is right."""
    words = torch.arange(-9_000, 9_000, dtype=torch.int64, device=device).mul_(GOLDEN)
    pieces, chunk_words = [words, words[:7]], 1 << 13
    try:
        from mball.memory.fingerprint_kernel import add_up_in_one_pass

        if torch.equal(add_up_in_one_pass(pieces, chunk_words), add_up_chunks(pieces, chunk_words)):
            return add_up_in_one_pass
        why = "it adds up wrongly"
    except (ImportError, DeviceError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        why = f"{type(error).__name__}: {error}"
    warn_once(f"no kernel by Triton for fingerprints ({why}): every sleep of 16 GiB takes some 40 ms more")
    return None


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
        total = (total * _CHAIN + upper) & _WORD
    return total


def _upper(words: Tensor) -> Tensor:
    return words.view(torch.int32)[1::2]
