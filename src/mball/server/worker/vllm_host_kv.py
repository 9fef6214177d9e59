"""vLLM's KV blocks in host memory, for an engine that computes on the CPU: vLLM's own copies are for GPUs alone.

Imported by vLLM's processes alone, as the module of its offloading spec.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from mball.errors import EngineUnsupported
from mball.loader import vllm_compat

_TIERING = vllm_compat.host_tiering()


class HostWorker(vllm_compat.host_tiering().worker):  # type: ignore[misc]
    """Copies blocks between an engine's memory and its rows of the memory that its processes share, at once."""

    def __init__(self, kv_caches: Any, region: Any) -> None:
        self._region = region
        self._pairs = [
            (part.tensor.view(torch.int8).view(-1, part.page_size_bytes), view)
            for part in kv_caches.tensors
            for view in [region.create_next_worker_view(part.page_size_bytes)]
        ]
        self._done: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec.block_ids, dst_spec.chunk_ids, out=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec.block_ids, src_spec.chunk_ids, out=False)

    def _copy(self, job_id: int, block_ids: Any, row_ids: Any, *, out: bool) -> bool:
        began = time.perf_counter()
        blocks, rows = torch.as_tensor(block_ids).long(), torch.as_tensor(row_ids).long()
        for pages, row in self._pairs:
            if out:
                row[rows] = pages[blocks]
            else:
                pages[blocks] = row[rows]
        nbytes = len(blocks) * sum(pages.shape[1] for pages, _ in self._pairs)
        self._done.append(_TIERING.copied(job_id, nbytes, time.perf_counter() - began))
        return True

    def get_finished(self) -> list[Any]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """All have ended."""

    def shutdown(self) -> None:
        self._pairs.clear()
        self._region.cleanup()


class HostTieringSpec(vllm_compat.host_tiering().spec):  # type: ignore[misc]
    """vLLM's own tiers of blocks."""

    def get_worker(self, kv_caches: Any) -> Any:
        if self.blocks_per_chunk != 1 or len(kv_caches.group_data_refs) != 1:
            raise EngineUnsupported("on the CPU vLLM's KV is kept for models whose layers are of one kind alone")
        worker: Any = self.__dict__.get("_worker")
        if worker is None:
            worker = self._worker = HostWorker(kv_caches, _TIERING.region(self))
        return worker
