"""What a GPU's first use costs, paid while a worker starts: the first token of a switch is as fast as any then."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from mball.device.account import OpenAccount
from mball.server.engine import runner, sampler
from mball.server.engine import transformers_adapter as adapter
from mball.server.engine.api import SamplingParams
from mball.server.engine.kv_cache import KVCache, KVGeometry
from mball.server.engine.scheduler import Chunk, Sequence

_BLOCK_SIZE = 16
_DEADLINE_S = 120.0


def warm_up(device: torch.device, geometry: KVGeometry) -> None:
    """Makes the device's context, opens its libraries and loads the kernels of a prefill, a decode and a draw, with a
    tiny model of the same dtype and head size. What stays is the context that the worker will be charged for.

    Raises RuntimeError, TimeoutError, DeviceError.
    """
    # cuDNN plans anew for every length that it has not seen: 2 ms of the host for each layer of each decode step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A library's handle belongs to a thread, and goes to the next one when that has ended: the engine's.
    with ThreadPoolExecutor(1, thread_name_prefix="warm-up") as thread:
        thread.submit(_warm_up, device, geometry).result(_DEADLINE_S)


def _warm_up(device: torch.device, geometry: KVGeometry) -> None:
    with torch.inference_mode():
        tiny = KVGeometry(1, 1, geometry.head_dim, geometry.dtype)
        module = adapter.build_tiny(tiny, device)
        cache = KVCache(tiny, 4, _BLOCK_SIZE, device, OpenAccount())
        try:
            _steps(module, cache, device)
        finally:
            del module
            cache.release()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _steps(module: torch.nn.Module, cache: KVCache, device: torch.device) -> None:
    both = [Sequence(str(block), list(range(1, _BLOCK_SIZE)), None, blocks=[block]) for block in (1, 2)]
    drawn = SamplingParams(max_tokens=1, seed=1, temperature=1.0, top_p=0.9, top_k=8)
    for start in (0, _BLOCK_SIZE - 1):
        chunks = [Chunk(s, start, len(s.tokens) - start, s.blocks if start == 0 else []) for s in both]
        ends = [chunk.count * (index + 1) - 1 for index, chunk in enumerate(chunks)]
        logits = runner.forward(module, cache, chunks, ends, device)
        for params in (drawn, SamplingParams(max_tokens=1, seed=1, temperature=0.0)):
            sampler.sample(logits, [sampler.Row(params, start, 0) for _ in both])
        for sequence in both:
            sequence.tokens.append(1)
