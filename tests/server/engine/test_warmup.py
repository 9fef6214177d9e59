from __future__ import annotations

import threading

import psutil
import pytest
import torch

from mball.server.engine.kv_cache import KVGeometry
from mball.server.engine.warmup import warm_up
from mball.units import MiB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_computes_with_the_models_dtype_and_head_and_leaves_nothing(dtype: torch.dtype, head_dim: int) -> None:
    warm_up(torch.device("cpu"), KVGeometry(32, 8, head_dim, dtype))
    before, threads = psutil.Process().memory_info().rss, threading.active_count()
    warm_up(torch.device("cpu"), KVGeometry(32, 8, head_dim, dtype))
    assert psutil.Process().memory_info().rss - before < 16 * MiB
    assert threading.active_count() == threads
