"""The verbs of an engine with several processes that compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mball.errors import TransitionError
from mball.memory.spec import WorkerSpec
from mball.server.worker.vllm_http import VllmClient
from mball.server.worker.vllm_verbs import VllmVerbs, describe, trim
from mball.units import GiB

SPEC = WorkerSpec("m", "/m", device="cuda:GPU-1+cuda:GPU-2", engine="vllm", engine_args={"tensor_parallel_size": 2})


class Ranks(VllmClient):
    """A server whose two ranks have weights of 5 and 4 GiB and a GiB of KV each. `gives`: what a sleep gives back."""

    def __init__(self, *gives: int, on_gpus: bool = True) -> None:
        super().__init__("/none")
        self.gives = gives
        self.parts: list[dict[str, Any]] = [
            {
                "weights_bytes": n * GiB,
                "kv_bytes": GiB,
                "image_bytes": n * GiB,
                "aside_bytes": 0,
                "free_bytes": 20 * GiB if on_gpus else None,
            }
            for n in (5, 4)
        ]

    async def post(self, path: str, body: Mapping[str, Any] | None = None, *, deadline_s: float) -> Any:
        if path.startswith("/sleep"):
            for part, nbytes in zip(self.parts, self.gives, strict=True):
                part["free_bytes"] += nbytes
                part["aside_bytes"] = GiB
        return {}

    async def rpc(self, method: str, args: Sequence[Any] = (), *, deadline_s: float) -> list[Any]:
        if method == "mball_trim":
            return [{"cached_bytes": nbytes} for nbytes in (3, 5)]
        return self.parts if method == "mball_describe" else [{"fingerprint": "0"}] * 2


async def test_what_it_holds_is_that_of_the_gpu_that_has_most() -> None:
    found = await describe(Ranks())
    assert (found.weights_bytes, found.kv_bytes) == (5 * GiB, GiB)
    assert found.image_bytes == (5 * GiB, 4 * GiB)


async def test_what_the_next_step_wants_again_is_that_of_the_gpu_that_had_most() -> None:
    assert await trim(Ranks()) == 5


async def test_all_that_share_a_memory_are_counted_together() -> None:
    found = await describe(Ranks(on_gpus=False))
    assert (found.weights_bytes, found.kv_bytes) == (9 * GiB, 2 * GiB)


@pytest.mark.parametrize(
    ("gives", "said"), [((6, 5), None), ((6, 4), "gave back 4.0 GiB, not 4.5"), ((0, 5), "gave back 0")]
)
async def test_a_sleep_is_proven_on_every_gpu(gives: tuple[int, int], said: str | None) -> None:
    client = Ranks(*(n * GiB for n in gives))
    verbs = VllmVerbs(SPEC, client, await describe(client), ["0", "0"], lambda: None, host_bytes=3 * GiB)
    demote = verbs.table()["demote"]
    if said is None:
        moved = await demote({"epoch": 1}, None)
        assert (moved["released_bytes"], moved["host_bytes"]) == (5 * GiB, 5 * GiB)
        assert (await verbs.table()["promote"]({"epoch": 2}, None))["host_bytes"] == 3 * GiB
        return
    with pytest.raises(TransitionError, match=said):
        await demote({"epoch": 1}, None)
