"""vLLM's sleep mode on a GPU. Imported by vLLM's processes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mball.device.cuda import CudaRuntime, CudaStream
from mball.loader import vllm_compat
from mball.memory.engine_image import Vault
from mball.memory.fingerprint import fingerprints
from mball.memory.vllm_rpc import STAGES, STEPS, Rpc
from mball.memory.vllm_sleeper import Sleeper, mapped


class CumemMemory:
    """The allocations of vLLM's weights pool on one GPU, through its allocator."""

    def __init__(self, cumem: vllm_compat.Cumem, device: torch.device) -> None:
        self.runtime = CudaRuntime(device)
        self._cumem = cumem
        self._device = device
        self._stream: CudaStream | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        with torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._copies().enter()
            yield

    def computes(self) -> bool:
        return STEPS.are_recent()

    def segments(self) -> Mapping[int, int]:
        return mapped(self._cumem, vllm_compat.WEIGHTS_TAG)

    def fingerprints(self, segments: Mapping[int, int]) -> dict[int, int]:
        words = [_words(address, nbytes, self._device) for address, nbytes in segments.items()]
        return dict(zip(segments, fingerprints(words), strict=True))

    def save(self, target: int, address: int, nbytes: int) -> None:
        self._copies().fetch(target, address, nbytes)

    def load(self, address: int, source: int, nbytes: int) -> None:
        self._copies().copy(address, source, nbytes)

    def finish(self) -> None:
        self._copies().finish()

    def _copies(self) -> CudaStream:
        if self._stream is None:
            self._stream = CudaStream(self._device)
        return self._stream


class ImageBackend(vllm_compat.sleeping().base):  # type: ignore[misc]
    """In the place of vLLM's own backend."""

    def suspend(self, level: int = 1) -> None:
        self._state = "SUSPENDED"
        sleeper().sleep(level)
        torch.cuda.empty_cache()

    def resume(self, tags: list[str] | None = None) -> None:
        self._state = "RESUMING"
        sleeper().wake(tags)
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        torch.cuda.synchronize()
        sleeper().forget(tags)
        self._state = "SUSPENDED"

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True


class CudaRpc(Rpc):
    """`worker_extension_cls`."""

    def mball_describe(self) -> dict[str, Any]:
        weights_bytes, kv_bytes = sleeper().mapped_bytes()
        free_bytes, _ = torch.cuda.mem_get_info()
        return {
            "weights_bytes": weights_bytes,
            "kv_bytes": kv_bytes,
            "image_bytes": weights_bytes,
            "aside_bytes": sleeper().vault.aside_bytes,
            "free_bytes": free_bytes,
        }

    def mball_trim(self) -> dict[str, Any]:
        trimmed, before = super().mball_trim(), torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        return {**trimmed, "cached_bytes": before - torch.cuda.memory_reserved()}

    def mball_vault(self) -> Vault:
        return sleeper().vault


@cache
def sleeper() -> Sleeper:
    """This process's, of the GPU that it computes on."""
    cumem = vllm_compat.cumem()
    return Sleeper(cumem, CumemMemory(cumem, torch.device("cuda", torch.cuda.current_device())))


class _Words:
    """Device memory as torch takes it (the CUDA array interface, version 3)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes // 8,),
            "typestr": "<i8",
            "data": (address, False),
            "version": 3,
        }


def _words(address: int, nbytes: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Words(address, nbytes), device=device)


# Imported by the worker's process, once its class is known and before it is asked for anything.
vllm_compat.keep_kernels(vllm_compat.gpu_worker())
vllm_compat.time_stages(vllm_compat.gpu_worker(), STAGES)
vllm_compat.note_steps(vllm_compat.gpu_worker(), STEPS.note)
