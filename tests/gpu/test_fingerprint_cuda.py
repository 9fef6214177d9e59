"""The kernel adds up what torch's own operators do, and is the one that is taken."""

from __future__ import annotations

import time

import pytest
import torch

from mball.memory import fingerprint
from mball.memory.fingerprint import add_up_chunks, fingerprints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_kernel_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = (1, 7, 4096, (1 << 21) - 1, 1 << 21, (1 << 24) + 5, 0)
    pieces = [torch.randint(-(1 << 62), 1 << 62, (n,), device="cuda", generator=generator) for n in sizes]
    pieces[2][9] = -(1 << 63)
    assert fingerprint._in_one_pass(pieces[0].device) is not None
    found = fingerprints(pieces)
    torch.cuda.synchronize()
    began = time.perf_counter()
    assert fingerprints(pieces) == found
    kernel_s = time.perf_counter() - began
    monkeypatch.setattr(fingerprint, "_in_one_pass", lambda device: None)
    assert fingerprints(pieces) == found
    pieces[5][-1] ^= 1
    assert fingerprints(pieces) != found
    assert torch.equal(add_up_chunks([], 8), torch.empty(0, 2, dtype=torch.int64))
    print(f"130 MiB in {kernel_s * 1e3:.2f} ms")  # noqa: T201
