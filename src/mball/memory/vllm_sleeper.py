"""What sleeps of vLLM's memory on a GPU, and what comes back: by its allocations and their tags."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from mball.loader.vllm_compat import KV_TAG, WEIGHTS_TAG, Cumem
from mball.memory.engine_image import EngineMemory, Vault


class Sleeper:
    """Puts one process's share of an engine to sleep and wakes it, while nothing computes."""

    def __init__(self, cumem: Cumem, memory: EngineMemory) -> None:
        self.vault = Vault(memory)
        self._cumem = cumem

    def sleep(self, level: int) -> None:
        """Level 1 keeps all but the KV cache; level 2 forgets the weights too."""
        forgotten = {KV_TAG} if level == 1 else {KV_TAG, WEIGHTS_TAG}
        awake = {a: data for a, data in self._cumem.allocations().items() if not data.is_asleep}
        nbytes = {a: int(data.handle[1]) for a, data in awake.items()}
        self.vault.put_away({a: n for a, n in nbytes.items() if awake[a].tag not in forgotten})
        if WEIGHTS_TAG in forgotten:
            self.vault.forget({a: n for a, n in nbytes.items() if awake[a].tag == WEIGHTS_TAG})
        self._unmap(awake.values())

    def wake(self, tags: Collection[str] | None) -> None:
        """Those with one of the tags (None: all), and whatever has neither of the two that may come later."""
        later = {KV_TAG, WEIGHTS_TAG} - set(tags or ())
        asleep = {
            address: data
            for address, data in self._cumem.allocations().items()
            if data.is_asleep and (tags is None or data.tag not in later)
        }
        # The KV cache last: it is mapped while the weights are on their way.
        for address, data in sorted(asleep.items(), key=lambda item: item[1].tag == KV_TAG):
            self._cumem.map(data.handle)
            data.is_asleep = False
            self.vault.bring_back(address)
        self.vault.finish(set(asleep))

    def forget(self, tags: Collection[str]) -> None:
        """Those with one of the tags, with what is in them."""
        self._unmap(d for d in self._cumem.allocations().values() if d.tag in tags and not d.is_asleep)

    def mapped_bytes(self) -> tuple[int, int]:
        """Of weights, and of KV."""
        weights, kv = (sum(mapped(self._cumem, tag).values()) for tag in (WEIGHTS_TAG, KV_TAG))
        return weights, kv

    def _unmap(self, allocations: Iterable[Any]) -> None:
        for data in allocations:
            self._cumem.unmap(data.handle)
            data.is_asleep = True


def mapped(cumem: Cumem, tag: str) -> dict[int, int]:
    """Bytes by address of the allocations with a tag that have memory."""
    # A copy: this is asked beside an engine that computes, and may allocate.
    there = list(cumem.allocations().items())
    return {address: int(data.handle[1]) for address, data in there if data.tag == tag and not data.is_asleep}
