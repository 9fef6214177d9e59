"""vLLM's worker on the CPU, with a sleep mode: its weights' pages go back to the kernel, and their addresses stay.

Imported by vLLM's worker process alone (`worker_cls`): a stock CPU worker answers that it sleeps, and keeps everything.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mball.device import libc
from mball.loader import vllm_compat
from mball.memory.engine_image import Vault
from mball.memory.fingerprint import fingerprints
from mball.memory.vllm_rpc import STAGES, STEPS, Rpc


class HostRuntime:
    """Host memory needs no registering to be copied to host memory."""

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        pass

    def unregister(self, address: int) -> None:
        pass


class HostMemory:
    """The whole pages of some tensors. What is left of them at the edges stays."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.runtime = HostRuntime()
        self._segments = dict(_whole_pages(tensors))

    def entered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def computes(self) -> bool:
        return STEPS.are_recent()

    def segments(self) -> Mapping[int, int]:
        return self._segments

    def fingerprints(self, segments: Mapping[int, int]) -> dict[int, int]:
        words = [_words(address, nbytes) for address, nbytes in segments.items()]
        return dict(zip(segments, fingerprints(words), strict=True))

    def save(self, target: int, address: int, nbytes: int) -> None:
        ctypes.memmove(target, address, nbytes)

    def load(self, address: int, source: int, nbytes: int) -> None:
        ctypes.memmove(address, source, nbytes)

    def finish(self) -> None:
        pass

    def release(self) -> None:
        """The pages go; those that are read again are zero. Raises OSError."""
        for address, nbytes in self._segments.items():
            if libc.LIBC.madvise(address, nbytes, mmap.MADV_DONTNEED) != 0:
                raise libc.error("madvise")


class SleepingCpuWorker(Rpc, vllm_compat.cpu_worker()):  # type: ignore[misc]
    """Level 1 keeps the weights in the image, or aside; level 2 forgets them: they have to be loaded again."""

    _weights: HostMemory | None = None
    _mball_vault: Vault | None = None

    def sleep(self, level: int = 1) -> None:
        weights = self._memory()
        if level == 1:
            self.mball_vault().put_away(weights.segments())
        else:
            self.mball_vault().forget(weights.segments())
        weights.release()
        HostMemory(vllm_compat.kv_caches_of(self)).release()

    def wake_up(self, tags: list[str] | None = None) -> None:
        if tags is not None and vllm_compat.WEIGHTS_TAG not in tags:
            return
        vault, addresses = self.mball_vault(), set(self._memory().segments())
        for address in addresses:
            vault.bring_back(address)
        vault.finish(addresses)

    def mball_describe(self) -> dict[str, Any]:
        weights = self._memory()
        held = sum(weights.segments().values())
        kv_bytes = sum(HostMemory(vllm_compat.kv_caches_of(self)).segments().values())
        # What is copied aside lies in the memory that is the device's, and counts there.
        return {"weights_bytes": held, "kv_bytes": kv_bytes, "image_bytes": held, "aside_bytes": 0, "free_bytes": None}

    def _memory(self) -> HostMemory:
        # Parameters alone: buffers are small, and a reload of the weights does not make them.
        if self._weights is None:
            self._weights = HostMemory(vllm_compat.model_of(self).parameters())
        return self._weights

    def mball_vault(self) -> Vault:
        if self._mball_vault is None:
            self._mball_vault = Vault(self._memory())
        return self._mball_vault


def _whole_pages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            yield begin, end - begin


def _words(address: int, nbytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.int64)


vllm_compat.time_stages(SleepingCpuWorker, STAGES)
vllm_compat.note_steps(SleepingCpuWorker, STEPS.note)
