"""vLLM's classes for KV blocks that go to MBALL's swap store and come back. Imported by vLLM's processes alone.

vLLM keeps blocks in host memory first, in rows, and copies between them and its device itself. Which rows go to a
second tier, and which are wanted back, it says in its scheduler's process; nothing here waits there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mball.loader import vllm_compat
from mball.loader.vllm_names import KV_ENVIRONMENT, KV_IDENTITY_ENVIRONMENT
from mball.server.worker.vllm_link import Link
from mball.swap.place import digest
from mball.swap.row_tier import RowTier
from mball.units import MiB

QUEUE_BYTES = 512 * MiB
"""Of blocks that wait to be written: a sleep waits for them."""

DRAIN_S = 35.0
CLOSE_S = 5.0
_SECONDS_A_TOKEN = 1e-4
"""What bringing a token back is thought to save: about what a GPU takes to compute one of a prompt. vLLM tells nobody
how long it takes."""

_TIERING = vllm_compat.tiering()


class StoreTier(vllm_compat.tiering().tier):  # type: ignore[misc]
    """The secondary tier; a row is one block of the store."""

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any) -> None:
        super().__init__(
            offloading_spec=offloading_spec, primary_kv_view=primary_kv_view, tier_type=tier_type, **options
        )
        _, row_bytes = primary_kv_view.shape or (0, 0)
        flat = primary_kv_view.cast("B")
        tokens = max(offloading_spec.tokens_per_block) * offloading_spec.blocks_per_chunk
        identity = os.environ[KV_IDENTITY_ENVIRONMENT]
        self._tier = RowTier(
            lambda row: flat[row * row_bytes : (row + 1) * row_bytes],
            digest("vllm", identity, vllm_compat.layout_of(offloading_spec), str(row_bytes)),
            row_bytes=row_bytes,
            queue_bytes=QUEUE_BYTES,
            saved_s=tokens * _SECONDS_A_TOKEN,
        )
        self._flat = flat
        self._link = Link(os.environ[KV_ENVIRONMENT], self._tier.use_store, self._tier.counts)

    def lookup(self, key: bytes, req_context: Any) -> Any:
        # The last four bytes of a key say of which group of layers it is.
        found = self._tier.lookup(key, req_context.req_id, key[-4:])
        return _TIERING.retry if found is None else _TIERING.hit if found else _TIERING.miss

    def submit_store(self, job: Any) -> None:
        self._tier.store(job.job_id, list(job.keys), _TIERING.rows(job), job.req_context.req_id)

    def submit_load(self, job: Any) -> None:
        self._tier.load(job.job_id, list(job.keys), _TIERING.rows(job))

    def get_finished_jobs(self) -> Iterable[Any]:
        return [_TIERING.result(done.number, done.whole, done.good) for done in self._tier.finished()]

    def on_new_request(self, req_context: Any) -> Any:
        return _TIERING.context()

    def on_request_finished(self, req_context: Any) -> None:
        self._tier.forget(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        self._tier.flush()

    def drain_jobs(self) -> None:
        self._tier.drain(DRAIN_S)

    def shutdown(self) -> None:
        self._link.close(CLOSE_S)
        if self._tier.close(CLOSE_S):
            self._flat.release()
