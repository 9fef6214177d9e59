"""The manager's verbs, for an engine that is vLLM's."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mball.device import proc
from mball.errors import TransitionError
from mball.memory.control import Handler, Message
from mball.memory.spec import WorkerSpec
from mball.server.worker.manners import Fence, no_descriptor, place_of
from mball.server.worker.vllm_door import Door
from mball.server.worker.vllm_http import VllmClient
from mball.swap.place import Place, digest
from mball.units import format_bytes

MOVE_S = 300.0
"""The manager's own deadlines are shorter; this ends what nobody waits for any more."""

ANSWER_S = 60.0
_IMAGE_POLL_S = 0.25
_FREED_SHARE = 0.9
"""Of the bytes that a sleep has to give back: allocators round."""


@dataclass(frozen=True, slots=True)
class Described:
    """What each of an engine's processes has on its device; `free_bytes` of those, where each has one of its own;
    `aside_bytes`: of host memory, copied out of all of them for as long as they sleep."""

    weights: tuple[int, ...]
    kv: tuple[int, ...]
    image_bytes: tuple[int, ...]
    free_bytes: tuple[int, ...] | None
    aside_bytes: int = 0

    @property
    def weights_bytes(self) -> int:
        """Of the device that has most."""
        return self._on_one(self.weights)

    @property
    def kv_bytes(self) -> int:
        return self._on_one(self.kv)

    def _on_one(self, parts: tuple[int, ...]) -> int:
        return sum(parts) if self.free_bytes is None else max(parts)


async def describe(client: VllmClient) -> Described:
    """Raises TransitionError."""
    parts = await client.rpc("mball_describe", deadline_s=ANSWER_S)
    if not parts:
        raise TransitionError("vLLM has no process that computes")
    free = [part["free_bytes"] for part in parts]
    return Described(
        weights=tuple(part["weights_bytes"] for part in parts),
        kv=tuple(part["kv_bytes"] for part in parts),
        image_bytes=tuple(part["image_bytes"] for part in parts),
        free_bytes=None if None in free else tuple(free),
        aside_bytes=sum(part["aside_bytes"] for part in parts),
    )


async def fingerprints(client: VllmClient) -> list[str]:
    """Of the parameters that each process has on the device. Raises TransitionError."""
    parts = await client.rpc("mball_fingerprint", deadline_s=MOVE_S)
    return [part["fingerprint"] for part in parts]


async def trim(client: VllmClient) -> int:
    """Freed memory goes back to the kernel and to the device: bytes of the one that gets most, which a step takes
    again. Raises TransitionError."""
    return max(int(part["cached_bytes"]) for part in await client.rpc("mball_trim", deadline_s=ANSWER_S))


async def private_bytes() -> int:
    """What this process and all below it hold alone."""
    return await asyncio.to_thread(proc.family_private_bytes, os.getpid()) or 0


class VllmVerbs:
    """The engine is awake. One residency verb at a time; `status`, `stop` and the filling of an image at any time."""

    def __init__(
        self,
        spec: WorkerSpec,
        client: VllmClient,
        awake: Described,
        loaded: list[str],
        stop: Callable[[], None],
        door: Door | None = None,
        host_bytes: int = 0,
    ) -> None:
        """`loaded`: the weights' fingerprints now. `door`: where its engine asks for the swap store (None: it keeps no
        KV there). `host_bytes`: what its engine has of host memory as long as it lives."""
        self._host_bytes = host_bytes
        self._door = door
        self._spec = spec
        self._client = client
        self._awake = awake
        self._stop = stop
        self._moving = asyncio.Lock()
        self._fence = Fence()
        self._image = self._filling = False
        self._key: str | None = None
        self._store: tuple[int, Message] | None = None
        self._asleep: int | None = None
        self._fingerprints = loaded
        # An adapter's weights are in none of the model's files, and a reload would fill the buffers that cold layers
        # pass through with the last of them.
        adapters = "enable_lora" in spec.engine_options
        self._forgets = not adapters and spec.resident_layers is None

    def table(self) -> dict[str, Handler]:
        return {
            "promote": self._promote,
            "demote": self._demote,
            "balloon": self._balloon,
            "threads": self._threads,
            "image": self._take_image,
            "drop_image": self._drop_image,
            "swap": self._swap,
            "canary": self._canary,
            "status": self._status,
            "stop": self._stopped,
        }

    def close(self) -> None:
        """Idempotent. The engine has ended."""
        if self._store is not None:
            os.close(self._store[0])
            self._store = None

    async def _promote(self, message: Message, fd: int | None) -> Message:
        """With a descriptor: of JSON that says where in the swap store the image is."""
        place = None if fd is None else await asyncio.to_thread(place_of, fd)
        began = time.perf_counter()
        async with self._moving:
            self._fence.check(message)
            came = {"weights_from": "dram"}
            if self._asleep == 1:
                await self._client.post("/wake_up", deadline_s=MOVE_S)
            elif self._asleep == 2:
                came = await self._bring_back(place)
            self._asleep = None
            took = time.perf_counter() - began
            moved = {"weights_bytes": self._awake.weights_bytes, "host_bytes": self._host_bytes}
            return {**moved, "load_s": took, "total_s": took, **came}

    async def _bring_back(self, place: Place | None) -> dict[str, str]:
        """The weights from the swap store, else from their files; what comes of them has to be what it was."""
        await self._client.post("/wake_up?tags=weights", deadline_s=MOVE_S)
        came = {"weights_from": "nvme"}
        if (missed := await self._restore(place)) is not None:
            came = {"weights_from": "source"} if place is None else {"weights_from": "source", "missed": missed}
            await self._client.rpc("reload_weights", deadline_s=MOVE_S)
        if await fingerprints(self._client) != self._fingerprints:
            raise TransitionError(f"{self._spec.model}: after a reload its weights are not what they were before")
        await self._client.post("/wake_up?tags=kv_cache", deadline_s=MOVE_S)
        return came

    async def _restore(self, place: Place | None) -> str | None:
        """Why the weights could not be had from the swap store; None where they were."""
        if place is None or self._store is None:
            return "absent"
        if place.key.hex() != self._key:
            return "changed"
        fd, slots = self._store
        arguments = [f"/proc/{os.getpid()}/fd/{fd}", slots, place.to_wire()]
        parts = await self._client.rpc("mball_restore", arguments, deadline_s=MOVE_S)
        missed = [part for part in parts if part["missed"] is not None]
        if not missed:
            return None
        sys.stderr.write(f"its image was not read from the swap store: {missed[0]['why']}\n")
        return str(missed[0]["missed"])

    async def _demote(self, message: Message, fd: int | None) -> Message:
        """With an image nothing is copied; without one the weights are forgotten, and read again from their files."""
        no_descriptor(fd)
        began = time.perf_counter()
        async with self._moving:
            self._fence.check(message)
            # One that is being filled now is waited for by whoever puts the weights away.
            level = 1 if self._image or self._filling or not self._forgets else 2
            if level == 2:
                self._fingerprints = await fingerprints(self._client)
            before, _ = await self._held()
            await self._client.post(f"/sleep?level={level}&mode=wait", deadline_s=MOVE_S)
            self._asleep = level
            # The answer alone proves nothing: a worker without a sleep mode gives the same one.
            after, aside_bytes = await self._held()
            for held, still, gives in zip(before, after, self._gives(), strict=True):
                if held - still < int(_FREED_SHARE * gives):
                    raise TransitionError(
                        f"{self._spec.model}: vLLM says that it sleeps and gave back "
                        f"{format_bytes(max(0, held - still))}, not {format_bytes(int(_FREED_SHARE * gives))}"
                    )
            released = min(held - still for held, still in zip(before, after, strict=True))
            took = time.perf_counter() - began
            return {"released_bytes": released, "host_bytes": self._host_bytes + aside_bytes, "total_s": took}

    def _gives(self) -> list[int]:
        """What a sleep has to give back of each device. Of the host's memory an engine holds what it has written of its
        KV cache, of a GPU's all."""
        awake = self._awake
        if awake.free_bytes is None:
            return [awake.weights_bytes]
        return [weights + kv for weights, kv in zip(awake.weights, awake.kv, strict=True)]

    async def _held(self) -> tuple[list[int], int]:
        """What grows and falls with what the engine holds of each device; and bytes that lie aside."""
        if self._awake.free_bytes is None:
            await trim(self._client)
            return [await private_bytes()], 0
        found = await describe(self._client)
        return [-free for free in found.free_bytes or ()], found.aside_bytes

    async def _balloon(self, message: Message, fd: int | None) -> Message:
        no_descriptor(fd)
        if message.get("bytes"):
            raise TransitionError(f"{self._spec.model}: vLLM's KV cache can't be made smaller while it lives")
        return {"ballooned_bytes": 0}

    async def _threads(self, message: Message, fd: int | None) -> Message:
        """vLLM binds its threads once, when it starts."""
        no_descriptor(fd)
        return {}

    async def _take_image(self, message: Message, fd: int | None) -> Message:
        if fd is None:
            raise TransitionError("image: no descriptor came with it")
        try:
            match message.get("state"):
                case "empty":
                    return await self._fill(fd)
                case "ready":
                    return await self._take_again(fd, message.get("key"))
                case state:
                    raise TransitionError(f"image: its state is 'empty' or 'ready', not {state!r}")
        finally:
            os.close(fd)

    async def _fill(self, fd: int) -> Message:
        """`key` names what is in it."""
        try:
            began = time.perf_counter()
            async with self._moving:
                if self._asleep is not None:
                    raise TransitionError("image: it is made of the weights on the device, and they are not there")
                offsets = [sum(self._awake.image_bytes[:rank]) for rank in range(len(self._awake.image_bytes))]
                path = f"/proc/{os.getpid()}/fd/{fd}"
                await self._client.rpc("mball_fill_image", [path, offsets], deadline_s=ANSWER_S)
                self._filling = True
            names = await self._filled()
            self._image = True
            self._key = digest("mball engine image", *names).hex()
            filled = {"bytes": sum(self._awake.image_bytes), "fill_s": time.perf_counter() - began}
            return {**filled, "key": self._key}
        finally:
            self._filling = False

    async def _take_again(self, fd: int, key: Any) -> Message:
        """The image that was filled here once, and has been in the swap store since."""
        async with self._moving:
            if self._key is None or key != self._key:
                raise TransitionError("image: vLLM's memory is another in every process: only it can fill its image")
            arguments = [f"/proc/{os.getpid()}/fd/{fd}", self._asleep == 2]
            parts = await self._client.rpc("mball_take_image", arguments, deadline_s=ANSWER_S)
            self._image = True
            if self._asleep == 2 and all(part["whole"] for part in parts):
                self._asleep = 1
        return {}

    async def _filled(self) -> list[str]:
        """What is in the parts of the processes."""
        async with asyncio.timeout(MOVE_S):
            while True:
                parts = await self._client.rpc("mball_image", deadline_s=ANSWER_S)
                if all(part["state"] == "ready" for part in parts):
                    return [str(part["name"]) for part in parts]
                if ended := [part for part in parts if part["state"] not in ("ready", "filling")]:
                    raise TransitionError(f"image: {ended[0].get('error') or 'given up'}")
                await asyncio.sleep(_IMAGE_POLL_S)

    async def _drop_image(self, message: Message, fd: int | None) -> Message:
        no_descriptor(fd)
        async with self._moving:
            if self._asleep == 1 and not self._forgets:
                raise TransitionError("image: its adapters' weights, or those beside its cold layers, are in it alone")
            parts = await self._client.rpc("mball_drop_image", deadline_s=MOVE_S)
            self._image = False
            if any(part["lost"] for part in parts):
                self._asleep = 2
            return {}

    async def _swap(self, message: Message, fd: int | None) -> Message:
        """The swap store: the descriptor of its file, and its layout under `slots`."""
        if fd is None:
            raise TransitionError("swap: no descriptor came with it")
        if self._store is not None:
            os.close(fd)
            raise TransitionError("swap: it is there already")
        self._store = (fd, message.get("slots", {}))
        if self._door is not None:
            await self._door.give(os.dup(fd), self._store[1])
        return {}

    async def _canary(self, message: Message, fd: int | None) -> Message:
        """One greedy token, or one vector."""
        no_descriptor(fd)
        began = time.perf_counter()
        if self._spec.task == "embed":
            body: dict[str, Any] = {"model": self._spec.model, "input": "The"}
            answer = await self._client.post("/v1/embeddings", body, deadline_s=ANSWER_S)
            ok = bool(answer["data"][0]["embedding"])
        else:
            body = {"model": self._spec.model, "prompt": "The", "max_tokens": 1, "temperature": 0}
            answer = await self._client.post("/v1/completions", body, deadline_s=ANSWER_S)
            ok = answer["usage"]["completion_tokens"] == 1
        return {"ok": ok, "total_s": time.perf_counter() - began}

    async def _status(self, message: Message, fd: int | None) -> Message:
        """No answer of the engine's is none of ours: the manager ends what hangs."""
        no_descriptor(fd)
        await self._client.get("/health", deadline_s=ANSWER_S)
        kv = {} if self._door is None else await self._door.counts()
        return {"engine": "vllm", "asleep": self._asleep, "image": self._image, "spare_bytes": 0, "kv": kv}

    async def _stopped(self, message: Message, fd: int | None) -> Message:
        no_descriptor(fd)
        self._stop()
        return {}
