"""vLLM's sleep mode on a GPU. Imported by vLLM's processes alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mball.device.cuda import CudaRuntime, CudaStream
from mball.loader import vllm_compat
from mball.memory.engine_image import Vault
from mball.memory.fingerprint import fingerprint
from mball.memory.vllm_rpc import Rpc


class CumemMemory:
    """The allocations of vLLM's weights pool on one GPU, through its allocator."""

    def __init__(self, cumem: vllm_compat.Cumem, device: torch.device) -> None:
        self.runtime = CudaRuntime(device)
        self._cumem = cumem
        self._device = device
        self._stream: CudaStream | None = None

    def enter(self) -> None:
        self._copies().enter()

    def segments(self) -> Mapping[int, int]:
        return self.mapped(vllm_compat.WEIGHTS_TAG)

    def mapped(self, tag: str) -> dict[int, int]:
        """Bytes by address of the allocations with a tag that have memory."""
        return {
            address: int(data.handle[1])
            for address, data in self._cumem.allocations().items()
            if data.tag == tag and not data.is_asleep
        }

    def fingerprints(self, segments: Mapping[int, int]) -> dict[int, int]:
        if not segments:
            return {}
        found = [fingerprint(_words(address, nbytes, self._device)) for address, nbytes in segments.items()]
        return dict(zip(segments, torch.stack(found).tolist(), strict=True))

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


class Sleeper:
    """Puts one process's share of an engine to sleep and wakes it."""

    def __init__(self, device: torch.device) -> None:
        self._cumem = vllm_compat.cumem()
        self.memory = CumemMemory(self._cumem, device)
        self.vault = Vault(self.memory)

    def sleep(self, level: int) -> None:
        """Level 1 keeps all but the KV cache; level 2 forgets the weights too. Nothing computes."""
        forgotten = {vllm_compat.KV_TAG} if level == 1 else {vllm_compat.KV_TAG, vllm_compat.WEIGHTS_TAG}
        awake = {a: data for a, data in self._cumem.allocations().items() if not data.is_asleep}
        with torch.cuda.stream(torch.cuda.current_stream()):
            self.vault.put_away({a: int(data.handle[1]) for a, data in awake.items() if data.tag not in forgotten})
        self._unmap(awake.values())
        torch.cuda.empty_cache()

    def forget(self, tags: Collection[str]) -> None:
        """Those with one of the tags, with what is in them. Nothing computes."""
        torch.cuda.synchronize()
        self._unmap(d for d in self._cumem.allocations().values() if d.tag in tags and not d.is_asleep)

    def wake(self, tags: list[str] | None) -> None:
        """Those with one of the tags (None: all), and whatever has neither of the two that may come later."""
        later = {vllm_compat.KV_TAG, vllm_compat.WEIGHTS_TAG} - set(tags or ())
        asleep = {
            address: data
            for address, data in self._cumem.allocations().items()
            if data.is_asleep and (tags is None or data.tag not in later)
        }
        # The KV cache last: it is mapped while the weights are on their way.
        for address, data in sorted(asleep.items(), key=lambda item: item[1].tag == vllm_compat.KV_TAG):
            self._cumem.map(data.handle)
            data.is_asleep = False
            self.vault.bring_back(address)
        self.vault.finish(set(asleep))

    def _unmap(self, allocations: Iterable[Any]) -> None:
        for data in allocations:
            self._cumem.unmap(data.handle)
            data.is_asleep = True


class ImageBackend(vllm_compat.sleeping().base):  # type: ignore[misc]
    """In the place of vLLM's own backend."""

    def suspend(self, level: int = 1) -> None:
        self._state = "SUSPENDED"
        sleeper().sleep(level)

    def resume(self, tags: list[str] | None = None) -> None:
        self._state = "RESUMING"
        sleeper().wake(tags)
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        sleeper().forget(tags)
        self._state = "SUSPENDED"

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True


class CudaRpc(Rpc):
    """`worker_extension_cls`."""

    def mball_describe(self) -> dict[str, Any]:
        memory = sleeper().memory
        weights_bytes = sum(memory.segments().values())
        kv_bytes = sum(memory.mapped(vllm_compat.KV_TAG).values())
        free_bytes, _ = torch.cuda.mem_get_info()
        return {
            "weights_bytes": weights_bytes,
            "kv_bytes": kv_bytes,
            "image_bytes": weights_bytes,
            "free_bytes": free_bytes,
        }

    def _mball_make_vault(self) -> Vault:
        return sleeper().vault


@cache
def sleeper() -> Sleeper:
    """This process's, of the GPU that it computes on."""
    return Sleeper(torch.device("cuda", torch.cuda.current_device()))


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
