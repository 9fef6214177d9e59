"""What the manager may ask of a worker over the control channel."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from mball.device.cuda import CudaRuntime
from mball.device.proc import private_bytes
from mball.errors import SwapMiss, TransitionError
from mball.loader.registered import IMAGES
from mball.memory.control import Asker, Channel, ChannelClosed, Handler, Message
from mball.server.engine.api import GenerateRequest, Output, Promoted, SamplingParams
from mball.server.engine.resident import Progress, torch_device
from mball.server.worker.manners import Fence, no_descriptor, place_of
from mball.server.worker.service import Service
from mball.server.worker.swap_client import RemoteBlockStore
from mball.server.worker.threads import in_thread
from mball.swap.place import Place
from mball.swap.slots import Slots
from mball.swap.stored_image import StoredImage

CANARY_TIMEOUT_S = 60.0
PROGRESS_INTERVAL_S = 0.2
_CANARY_TEXT = "The"

_log = structlog.get_logger(__name__)


class Verbs:
    """The residency verbs run one at a time, each in a thread; `status`, `stop` and the filling of an image, which
    reads the shards alone, at any time."""

    def __init__(
        self, service: Service, channel: Channel, stop: Callable[[], None], asker: Asker | None = None
    ) -> None:
        """`asker` makes the worker's own calls (None: it has none to make)."""
        self._service = service
        self._channel = channel
        self._stop = stop
        self._moving = asyncio.Lock()
        self._filling = asyncio.Lock()
        self._unwanted = threading.Event()
        self._fence = Fence()
        self._image_fd: int | None = None
        self._registering: asyncio.Task[None] | None = None
        self._asker = asker
        self._slots: Slots | None = None
        self._canary_ids = service.tokenizer.encode(_CANARY_TEXT, service.engine.max_model_len)

    def table(self) -> dict[str, Handler]:
        return {
            "promote": self._promote,
            "demote": self._demote,
            "balloon": self._balloon,
            "threads": self._threads,
            "image": self._image,
            "drop_image": self._drop_image,
            "swap": self._swap,
            "canary": self._canary,
            "status": self._status,
            "stop": self._stopped,
        }

    def close(self) -> None:
        """Idempotent. The engine has ended."""
        self._let_go()
        if self._slots is not None:
            self._slots.disk.close()

    def _let_go(self) -> None:
        """The engine reads the image no more."""
        if self._image_fd is not None:
            IMAGES.detach(self._image_fd)
            os.close(self._image_fd)
            self._image_fd = None

    async def _promote(self, message: Message, fd: int | None) -> Message:
        """With a descriptor: of JSON that says where in the swap store the image is."""
        place = None if fd is None else await in_thread(lambda: place_of(fd))
        async with self._moving:
            self._fence.check(message)
            progress = _Progress(self._channel)
            try:
                promoted, came = await self._load(place, progress.report)
            finally:
                await progress.close()
            self._service.open_gate()
            _log.info("promoted", **dataclasses.asdict(promoted), **came)
            return {**dataclasses.asdict(promoted), **came}

    async def _load(self, place: Place | None, report: Progress) -> tuple[Promoted, dict[str, str]]:
        """From the image, else straight from the swap store, else from the shards, which a miss leads to as well."""
        engine, image_fd, slots, came = self._service.engine, self._image_fd, self._slots, dict[str, str]()
        if image_fd is None and place is not None and slots is not None:

            def from_the_store() -> Promoted:
                if engine.image_key() != place.key:
                    raise SwapMiss("changed", "the model's files are others than those that it was made of")
                return engine.promote(None, report, StoredImage(slots, place).read)

            try:
                return await in_thread(from_the_store), {"weights_from": "nvme"}
            except SwapMiss as miss:
                _log.warning("image missed", reason=miss.reason, error=str(miss))
                came["missed"] = miss.reason
        promoted = await in_thread(lambda: engine.promote(image_fd, report))
        return promoted, {**came, "weights_from": "source" if image_fd is None else "dram"}

    async def _demote(self, message: Message, fd: int | None) -> Message:
        no_descriptor(fd)
        began = time.perf_counter()
        async with self._moving:
            self._fence.check(message)
            self._service.close_gate()
            async with self._service.embedding:
                demoted = await in_thread(self._service.engine.demote)
            kept = await in_thread(trimmed_private_bytes)
            answer = {"released_bytes": demoted.released_bytes, "private_bytes": kept}
            _log.info("demoted", **answer)
            return {**answer, "total_s": time.perf_counter() - began}

    async def _balloon(self, message: Message, fd: int | None) -> Message:
        """`bytes` of device memory that the engine does without from now on; `gently`: only what nobody uses."""
        no_descriptor(fd)
        nbytes, gently = message.get("bytes"), message.get("gently", False)
        if not isinstance(nbytes, int) or not isinstance(gently, bool):
            raise TransitionError(f"balloon: bytes and gently are {nbytes!r} and {gently!r}")
        async with self._moving:
            self._fence.check(message)
            ballooned = await in_thread(lambda: self._service.engine.balloon(nbytes, gently=gently))
            _log.info("ballooned", **dataclasses.asdict(ballooned))
            return dataclasses.asdict(ballooned)

    async def _threads(self, message: Message, fd: int | None) -> Message:
        no_descriptor(fd)
        threads = message.get("threads")
        if not isinstance(threads, int) or threads < 1:
            raise TransitionError(f"threads: {threads!r} is no number of threads")
        self._service.engine.set_threads(threads)
        return {}

    async def _image(self, message: Message, fd: int | None) -> Message:
        if fd is None:
            raise TransitionError("image: no descriptor came with it")
        try:
            answer: Message = {}
            match message.get("state"):
                case "ready":
                    await self._check_files(message.get("key"))
                case "empty":
                    answer = await self._fill(fd)
                case state:
                    raise TransitionError(f"image: its state is 'empty' or 'ready', not {state!r}")
            async with self._moving:
                if not self._has_image(fd):
                    await self._take_image(os.dup(fd))
            return answer
        finally:
            os.close(fd)

    async def _check_files(self, made_of: str | None) -> None:
        """Raises TransitionError."""
        if made_of is None:
            return
        key = await in_thread(self._service.engine.image_key)
        if key is None or key.hex() != made_of:
            raise TransitionError("image: the model's files are others than those that it was made of")

    async def _fill(self, fd: int) -> Message:
        """`key` names what is in it; None where the files changed meanwhile."""
        engine = self._service.engine
        async with self._filling:
            unwanted = self._unwanted = threading.Event()
            before = await in_thread(engine.image_key)
            began = time.perf_counter()
            filled = await in_thread(lambda: engine.fill_image(fd, unwanted))
            fill_s = time.perf_counter() - began
            after = await in_thread(engine.image_key)
        key = None if before is None or before != after else before.hex()
        return {"bytes": filled, "fill_s": fill_s, "key": key}

    def _has_image(self, fd: int) -> bool:
        return self._image_fd is not None and os.path.sameopenfile(self._image_fd, fd)

    async def _take_image(self, image_fd: int) -> None:
        try:
            await in_thread(lambda: self._service.engine.use_image(image_fd))
        except BaseException:
            os.close(image_fd)
            raise
        await in_thread(self._let_go)
        self._image_fd = image_fd
        self._register_ahead(image_fd)

    def _register_ahead(self, image_fd: int) -> None:
        """The driver learns of the image's pages now, so that the next promotion does not wait for that."""
        device = torch_device(self._service.spec.device)
        if device.type == "cuda":
            image = IMAGES.attach(image_fd, CudaRuntime(device))
            self._registering = asyncio.create_task(in_thread(image.register), name="register image")
            self._registering.add_done_callback(_registered)

    async def _drop_image(self, message: Message, fd: int | None) -> Message:
        """Also one that is being filled: that ends at once, with an error."""
        no_descriptor(fd)
        self._unwanted.set()
        async with self._filling, self._moving:
            await in_thread(lambda: self._service.engine.use_image(None))
            await in_thread(self._let_go)
        return {}

    async def _swap(self, message: Message, fd: int | None) -> Message:
        """The swap store: the descriptor of its file, and its layout under `slots`."""
        if fd is None:
            raise TransitionError("swap: no descriptor came with it")
        if self._slots is not None:
            os.close(fd)
            raise TransitionError("swap: it is there already")
        try:
            self._slots = Slots.from_wire(fd, message["slots"])
        except (KeyError, TypeError, ValueError) as error:
            os.close(fd)
            raise TransitionError(f"swap: its layout is {message.get('slots')!r} ({error!r})") from None
        if self._asker is not None and self._service.spec.task != "embed":
            store = RemoteBlockStore(self._slots, self._asker, asyncio.get_running_loop())
            await in_thread(lambda: self._service.generator("swap").use_block_store(store))
        return {}

    async def _canary(self, message: Message, fd: int | None) -> Message:
        """One greedy token, or one vector."""
        no_descriptor(fd)
        began = time.perf_counter()
        if self._service.spec.task == "embed":
            embedder = self._service.embedder("canary")
            async with self._service.embedding:
                await in_thread(lambda: embedder.embed([self._canary_ids]))
        else:
            await self._one_token()
        return {"ok": True, "total_s": time.perf_counter() - began}

    async def _one_token(self) -> None:
        engine = self._service.generator("canary")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Output] = loop.create_future()

        def settle(output: Output) -> None:
            if output.finish_reason is not None and not answer.done():
                answer.set_result(output)

        def emit(output: Output) -> None:
            loop.call_soon_threadsafe(settle, output)

        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        request = GenerateRequest("canary", self._canary_ids, sampling, probe=True)
        engine.submit(request, emit)
        try:
            async with asyncio.timeout(CANARY_TIMEOUT_S):
                output = await answer
        except TimeoutError:
            raise TransitionError(f"canary: no token within {CANARY_TIMEOUT_S:.0f} s") from None
        finally:
            engine.abort("canary")
        if output.token_id is None:
            raise TransitionError(f"canary: {output.error or output.finish_reason}")

    async def _status(self, message: Message, fd: int | None) -> Message:
        no_descriptor(fd)
        return self._service.status()

    async def _stopped(self, message: Message, fd: int | None) -> Message:
        no_descriptor(fd)
        self._stop()
        return {}


class _Progress:
    """Loaded bytes as events, from the loader's threads, a few a second."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        self._task: asyncio.Task[None] | None = None

    def report(self, loaded_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._next or loaded_bytes == total_bytes:
            self._next = now + PROGRESS_INTERVAL_S
            event = {"event": "progress", "loaded_bytes": loaded_bytes, "total_bytes": total_bytes}
            self._loop.call_soon_threadsafe(self._start, event)

    def _start(self, event: dict[str, Any]) -> None:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._send(event))

    async def _send(self, event: dict[str, Any]) -> None:
        try:
            await self._channel.send(event)
        except ChannelClosed:
            return

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=PROGRESS_INTERVAL_S)
            self._task.cancel()


def trimmed_private_bytes() -> int:
    """What this process holds alone, once freed heap is back with the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return private_bytes(os.getpid()) or 0


def _registered(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.warning("image not registered ahead of need", error=str(error))
