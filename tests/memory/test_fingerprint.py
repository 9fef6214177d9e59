from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.errors import DeviceError
from mball.memory import fingerprint
from mball.memory.fingerprint import add_up_chunks, fingerprint_of, fingerprints

WORDS = 70_000
"""More than a chunk."""


def words() -> torch.Tensor:
    return torch.arange(WORDS, dtype=torch.int64) * 7919


def taken(tensor: torch.Tensor) -> int:
    [found] = fingerprints([tensor])
    return found


@settings(deadline=None, max_examples=50)
@given(st.integers(0, WORDS - 1), st.integers(0, 63))
def test_one_bit_anywhere_changes_it(place: int, bit: int) -> None:
    changed = words()
    changed[place] ^= 1 << bit if bit < 63 else -(1 << 63)
    assert taken(changed) != taken(words())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, WORDS - 1), st.integers(0, WORDS - 1))
def test_words_that_change_places_change_it(one: int, other: int) -> None:
    changed = words()
    changed[[one, other]] = changed[[other, one]]
    assert (taken(changed) == taken(words())) == (one == other)


def test_the_highest_bits_alone_have_places_too() -> None:
    found = set()
    for place in range(64):
        tensor = torch.zeros(64, dtype=torch.int64)
        tensor[place] = 1 << 62
        found.add(taken(tensor))
    assert len(found) == 64


def test_several_are_each_as_if_alone() -> None:
    pieces = [words(), words()[: 2**15], words()[:7], torch.empty(0, dtype=torch.int64), words()[3:9]]
    assert fingerprints(pieces) == [taken(piece) for piece in pieces]
    assert len(set(fingerprints(pieces))) == len(pieces)
    assert fingerprints([]) == []


def test_zeros_are_told_by_their_number() -> None:
    assert len({taken(torch.zeros(n, dtype=torch.int64)) for n in range(1, 9)}) == 8


def test_tensors_of_any_dtype_and_shape() -> None:
    def tensors() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        odd = torch.randint(0, 255, (13,), dtype=torch.uint8, generator=generator)
        wide = torch.randn(7, 11, dtype=torch.bfloat16, generator=generator).t()
        return [odd, wide, torch.zeros(3), torch.empty(0)]

    first = fingerprint_of(tensors())
    assert fingerprint_of(tensors()) == first
    assert fingerprint_of([*tensors(), *tensors()]) != first
    for number, place in ((0, 12), (0, 0), (1, 76), (2, 2)):
        changed = tensors()
        changed[number].untyped_storage()[place * changed[number].itemsize] ^= 1
        assert fingerprint_of(changed) != first
    same = tensors()
    assert fingerprint_of([*same, same[1].view(77) if same[1].is_contiguous() else same[1]]) == first
    assert fingerprint_of([]) == 0


def right(pieces: Sequence[torch.Tensor], chunk_words: int) -> torch.Tensor:
    return add_up_chunks(pieces, chunk_words).clone()


def wrong(pieces: Sequence[torch.Tensor], chunk_words: int) -> torch.Tensor:
    return add_up_chunks(pieces, chunk_words) + 1


def broken(pieces: Sequence[torch.Tensor], chunk_words: int) -> torch.Tensor:
    raise DeviceError("Triton: no assembler")


@pytest.fixture
def _anew() -> Iterator[None]:
    """What was found out of a kernel is found out again."""
    fingerprint._in_one_pass.cache_clear()
    yield
    fingerprint._in_one_pass.cache_clear()


@pytest.mark.usefixtures("_anew")
@pytest.mark.parametrize(
    ("kernel", "why"), [(right, ""), (wrong, "adds up wrongly"), (broken, "no assembler"), (None, "ImportError")]
)
def test_a_kernel_is_taken_where_it_is_there_and_right(
    kernel: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told = ModuleType("kernel"), list[str]()
    if kernel is not None:
        made.__dict__["add_up_in_one_pass"] = kernel
    monkeypatch.setitem(sys.modules, "mball.memory.fingerprint_kernel", made)
    monkeypatch.setattr(fingerprint, "warn_once", told.append)
    taken = fingerprint._in_one_pass(torch.device("cpu"))
    assert taken is (right if kernel is right else None)
    assert [why in line for line in told] == ([True] if why else [])
