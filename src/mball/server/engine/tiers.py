"""The KV tier of a model as its spec wants it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mball.device.cuda import CudaRuntime
from mball.device.host import available_bytes
from mball.memory.spec import WorkerSpec
from mball.server.engine.kv_cache import KVGeometry
from mball.swap.kv_tier import KVTier
from mball.units import MiB

_MOST_BYTES = 512 * MiB
_SHARE = 32
"""Of the host's free memory, where nothing is said, at most so many-th: every model's worker pins as much."""


def open_tier(
    spec: WorkerSpec, geometry: KVGeometry, model: bytes, device: torch.device, notify: Callable[[], None]
) -> KVTier | None:
    """None where it has no arena, or no block fits into it. Raises OSError."""
    block_bytes = geometry.block_bytes(spec.block_size)
    nbytes = arena_bytes(spec, device) if spec.enable_prefix_caching else 0
    if nbytes < block_bytes:
        return None
    return KVTier(
        model,
        block_tokens=spec.block_size,
        block_bytes=block_bytes,
        arena_bytes=nbytes,
        runtime=CudaRuntime(device) if device.type == "cuda" else None,
        notify=notify,
    )


def arena_bytes(spec: WorkerSpec, device: torch.device) -> int:
    """What is said; else on a GPU a modest part of the host's memory, and on the CPU none: the pool is such memory."""
    if spec.kv_arena_bytes is not None:
        return spec.kv_arena_bytes
    return min(_MOST_BYTES, available_bytes() // _SHARE) if device.type == "cuda" else 0
