"""Times a loader's first and second call in this process, and what memory it takes meanwhile."""

from __future__ import annotations

import gc
import mmap
import os
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from mball.bench.contenders import Loader
from mball.bench.sampler import Sampler, status_bytes
from mball.units import MiB

_STAGING_BYTES = 64 * MiB


def on_cpu(loader: Loader, nbytes: int, *, digest: bool = False, limit_s: float | None = None) -> dict[str, Any]:
    """`peak_bytes` of memory above the start, in the first call. Twice `nbytes` of memory were touched before. A first
    call that takes more than `limit_s` is the only one."""
    touch(2 * nbytes)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    seconds, tensors = _timed(loader, None)
    result: dict[str, Any] = {"bytes": nbytes, "first_s": seconds}
    result["peak_bytes"] = status_bytes("VmHWM") - before
    if limit_s is None or seconds <= limit_s:
        del tensors
        _let_go(loader)
        result["steady_s"], tensors = _timed(loader, None)
    result["facts"] = {"file_backed_bytes": file_backed_bytes(tensors)}
    if digest:
        result["digests"] = digests(tensors)
    return result


def on_gpu(
    loader: Loader, nbytes: int, device: str, *, digest: bool = False, limit_s: float | None = None
) -> dict[str, Any]:
    """The process has a context and nothing else before the clock. Memory is sampled in the first call alone. A first
    call that takes more than `limit_s` is the only one."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    with Sampler(device) as sampled:
        seconds, tensors = _timed(loader, device)
    result: dict[str, Any] = {"bytes": nbytes, "first_s": seconds}
    result["private_bytes"] = sampled.private_bytes
    result["host_bytes"] = sampled.host_bytes
    result["vram_extra_bytes"] = sampled.device_bytes - nbytes
    if limit_s is None or seconds <= limit_s:
        del tensors
        _let_go(loader)
        torch.cuda.empty_cache()
        result["steady_s"], tensors = _timed(loader, device)
    result["facts"] = {"device": torch.cuda.get_device_name(device)}
    if digest:
        result["digests"] = digests(tensors)
    return result


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """dtype, shape and xxh3 of every tensor's bytes."""
    on_device = any(tensor.is_cuda for tensor in tensors.values())
    staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True) if on_device else None
    return {name: _described(tensor, staging) for name, tensor in tensors.items()}


def reference_digests(paths: Sequence[Path]) -> dict[str, str]:
    """The digests of the tensors that the safetensors library finds in these files, read on the CPU."""
    found: dict[str, str] = {}
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        for path in paths:
            tensors = load_file(path)
            found |= zip(tensors, pool.map(lambda tensor: _described(tensor, None), tensors.values()), strict=True)
    return found


def touch(nbytes: int) -> None:
    """Write to so much new memory and free it: in a virtual machine the first touch of a page is the host's time."""
    with mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, nbytes, mmap.PAGESIZE):
            memory[at] = 1


def file_backed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors that lie in mappings of files: they change or vanish with the file."""
    begins, ends, named = [], [], []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        begin, _, end = fields[0].partition("-")
        begins.append(int(begin, 16))
        ends.append(int(end, 16))
        named.append(len(fields) > 5 and fields[5].startswith("/"))
    total = 0
    for tensor in tensors.values():
        at = bisect_right(begins, tensor.data_ptr()) - 1
        if tensor.numel() and at >= 0 and tensor.data_ptr() < ends[at] and named[at]:
            total += tensor.nbytes
    return total


def _timed(loader: Loader, device: str | None) -> tuple[float, Mapping[str, Tensor]]:
    begin = time.perf_counter()
    tensors = loader.load()
    if device is not None:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, tensors


def _let_go(loader: Loader) -> None:
    loader.release()
    gc.collect()


def _described(tensor: Tensor, staging: Tensor | None) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {_digest(tensor, staging)}"


def _digest(tensor: Tensor, staging: Tensor | None) -> str:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if staging is None or not tensor.is_cuda:
        return xxhash.xxh3_64_hexdigest(flat.numpy().data)
    digest = xxhash.xxh3_64()
    for at in range(0, flat.numel(), staging.numel()):
        part = staging[: min(staging.numel(), flat.numel() - at)]
        part.copy_(flat[at : at + part.numel()])
        digest.update(part.numpy().data)
    return digest.hexdigest()
