"""The pool's memory: laid out by blocks, zero when given to a sequence, gone after a release."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mball.device.account import OpenAccount
from mball.errors import DeviceOutOfMemory
from mball.server.engine.kv_cache import KVCache, KVGeometry
from mball.units import MiB

GEOMETRY = KVGeometry(num_layers=4, num_kv_heads=2, head_dim=64, dtype=torch.float32)
CPU = torch.device("cpu")


def cache(num_blocks: int) -> KVCache:
    return KVCache(GEOMETRY, num_blocks, 16, CPU, OpenAccount())


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def test_a_block_is_contiguous_over_all_layers() -> None:
    kv = cache(5)
    assert GEOMETRY.token_bytes == 4 * 2 * 2 * 64 * 4
    assert kv.nbytes == 5 * 16 * GEOMETRY.token_bytes
    for keys, values in kv.layers:
        keys[3] = 1.0
        values[3] = 1.0
    flat = kv.pool.flatten()
    per_block = flat.numel() // 5
    assert bool((flat[3 * per_block : 4 * per_block] == 1).all())
    assert float(flat.sum()) == per_block
    kv.clear([3])
    assert float(flat.sum()) == 0
    kv.release()


def test_release_gives_every_page_back_even_where_a_view_lives_on() -> None:
    kv = cache(2048)
    before = private_bytes()
    kv.pool.fill_(1.0)
    view = kv.layers[1][0][7]
    assert private_bytes() - before > kv.nbytes // 2
    nbytes = kv.nbytes
    assert kv.release() == nbytes
    assert private_bytes() - before < nbytes // 4
    assert float(view.sum()) == 0, "the view reads pages that were given back"
    assert kv.release() == 0


def test_memory_is_touched_only_as_blocks_come_into_use() -> None:
    before = private_bytes()
    kv = cache(2048)
    kv.clear([1, 2])
    assert private_bytes() - before < 8 * MiB < kv.nbytes
    kv.release()


def test_what_the_account_refuses_is_not_taken() -> None:
    class Full(OpenAccount):
        def take(self, nbytes: int) -> None:
            raise DeviceOutOfMemory("full", nbytes, 0, 0)

    before = private_bytes()
    with pytest.raises(DeviceOutOfMemory):
        KVCache(GEOMETRY, 2048, 16, CPU, Full())
    assert private_bytes() - before < 8 * MiB
