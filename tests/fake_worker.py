"""A worker without an engine: the control protocol and canned answers over HTTP, with faults on demand.

It starts in half a second. Its weights are bytes taken from a simulated device, or touched private memory on the CPU.
Faults are `Knobs`, handed over in the environment: `ModelSpec(..., environment=Knobs(promote_s=1).environment())`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import mmap
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from mball.device import libc, prctl
from mball.device.account import open_account
from mball.device.proc import private_bytes
from mball.errors import Cancelled, CheckpointError, SwapMiss, TransitionError
from mball.memory import control
from mball.memory.spec import WorkerSpec
from mball.swap.disk import aligned
from mball.swap.place import Place, digest
from mball.swap.slots import Slots

PR_SET_PDEATHSIG = 1

MiB = 1 << 20


@dataclass(frozen=True)
class Knobs:
    """How this worker behaves. A step is start, promote, canary, demote, balloon, image, drop_image, stop or
    request. Only where it `balloons` does it say what it could give up, and `layer_bytes` after that, with which a
    request would take `layer_s` longer; whole pieces of `piece_bytes` go and come. It says that it has `host_bytes` of
    host memory, and `aside_bytes` more while its weights are away.

    `crash_at`, `hang_at`, `fail_at` name the step at which it kills itself, never answers, or answers with an error.
    `content` names what is in its image, by default its own name (-: it can't be loaded from the swap store); reading
    it there takes `reads_s` and not `promote_s`. `leases`: so many blocks of the swap store it leases as soon as it has
    it, and never writes.
    `orphan`: it has a child, with `leaves_group` in a session of its own. `lone`: it goes on without a manager.
    `times` bounds how often that happens, over all workers that share the file `counter`; without one: always.
    """

    weights_bytes: int = 64 * MiB
    kv_bytes: int = 16 * MiB
    image_bytes: int = 0
    working_bytes: int = 0
    extra_bytes: int = 0
    start_s: float = 0.0
    promote_s: float = 0.0
    demote_s: float = 0.0
    image_s: float = 0.0
    token_s: float = 0.0
    tokens: int = 4
    kept_bytes: int = 0
    host_bytes: int = 0
    aside_bytes: int = 0
    balloons: bool = False
    layer_bytes: int = 0
    layer_s: float = 0.0
    piece_bytes: int = 1
    deaf: bool = False
    orphan: bool = False
    leaves_group: bool = False
    lone: bool = False
    leases: int = 0
    content: str = ""
    reads_s: float = 0.0
    cannot_start: str = ""
    crash_at: str = ""
    hang_at: str = ""
    fail_at: str = ""
    fail_with: str = "a knob said so"
    times: int = 0
    counter: str = ""

    def environment(self) -> dict[str, str]:
        return {"FAKE_WORKER": json.dumps(dataclasses.asdict(self))}

    @classmethod
    def from_environment(cls) -> Knobs:
        return cls(**json.loads(os.environ.get("FAKE_WORKER", "{}")))


def command() -> list[str]:
    """What starts it, for Manager's `command_for`."""
    return [sys.executable, str(Path(__file__).resolve())]


class FakeWorker:
    """One model: a lump of bytes that is on the device or not."""

    def __init__(self, spec: WorkerSpec, knobs: Knobs) -> None:
        self.spec = spec
        self.knobs = knobs
        self.account = open_account(spec.device)
        self.baseline = 0
        self.resident = False
        self.memory: mmap.mmap | None = None
        self.taken = 0
        self.image: int | None = None
        self.image_ready = False
        self.in_flight = 0
        self.asked: dict[str, str] = {}
        self.ballooned = 0
        self.threads = spec.threads
        self.unwanted = asyncio.Event()
        self.stopped = asyncio.Event()
        self.asker: control.Asker | None = None
        self.slots: Slots | None = None

    @property
    def held(self) -> int:
        knobs = self.knobs
        return knobs.weights_bytes + knobs.kv_bytes - self.ballooned + knobs.working_bytes + knobs.extra_bytes

    async def hello(self) -> dict[str, Any]:
        """An engine that starts on the device takes what it needs before."""
        self.baseline = private_bytes(os.getpid()) or 0
        if self.spec.starts_awake:
            await asyncio.to_thread(self._take, self.held - self.knobs.working_bytes)
            self.resident = True
        return {
            "resident": self.resident,
            "event": "hello",
            "pid": os.getpid(),
            "baseline_bytes": self.baseline,
            "weights_bytes": self.knobs.weights_bytes,
            "kv_bytes": self.knobs.kv_bytes,
            "image_bytes": self.knobs.image_bytes or self.knobs.weights_bytes,
            "working_bytes": self.knobs.working_bytes,
            # One of its own memory has no name before it is filled.
            "image_key": None if self.spec.starts_awake else self.image_key,
            "layer_bytes": self.knobs.layer_bytes,
            "host_bytes": self.knobs.host_bytes,
        }

    @property
    def image_key(self) -> str | None:
        whose = f" of {os.getpid()}" if self.spec.starts_awake else ""
        content = self.knobs.content or self.spec.model
        return digest("fake image", content + whose).hex() if self.knobs.content != "-" else None

    async def fault(self, step: str) -> None:
        knobs = self.knobs
        if step not in (knobs.crash_at, knobs.hang_at, knobs.fail_at) or not self._still_faulty():
            return
        if step == knobs.crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == knobs.hang_at:
            await asyncio.Event().wait()
        raise TransitionError(knobs.fail_with)

    def _still_faulty(self) -> bool:
        if not self.knobs.counter:
            return True
        with Path(self.knobs.counter).open("a+b") as file:
            file.write(b".")
            file.flush()
            return file.tell() <= self.knobs.times

    def _take(self, nbytes: int) -> None:
        self.account.take(nbytes)
        self.taken += nbytes
        if self.spec.device == "cpu":
            self.memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.memory.madvise(mmap.MADV_POPULATE_WRITE if hasattr(mmap, "MADV_POPULATE_WRITE") else 23)

    def _give(self) -> int:
        released = self.taken - min(self.taken, self.knobs.kept_bytes)
        self.account.give(released)
        if self.memory is not None and not self.knobs.kept_bytes:
            self.memory.close()
            self.memory = None
        self.taken -= released
        return released

    async def promote(self, message: control.Message, fd: int | None) -> control.Message:
        began = time.monotonic()
        await asyncio.to_thread(self._take, self.held - self.taken)
        came = await asyncio.to_thread(self._read_stored, fd)
        await asyncio.sleep(self.knobs.reads_s if came["weights_from"] == "nvme" else self.knobs.promote_s)
        try:
            await self.fault("promote")
        except TransitionError:
            self._give()
            raise
        self.resident = True
        took = time.monotonic() - began
        return {
            "weights_bytes": self.knobs.weights_bytes,
            "kv_bytes": self.knobs.kv_bytes,
            "load_s": took,
            "total_s": took,
            "from_image": self.image_ready,
            "host_bytes": self.knobs.host_bytes,
            **came,
        }

    def _read_stored(self, fd: int | None) -> dict[str, str]:
        """All of its image in the swap store, where it was told where that is."""
        if fd is None or self.slots is None or self.image_ready:
            return {"weights_from": "dram" if self.image_ready else "source"}
        place = Place.from_wire(json.loads(os.pread(fd, os.fstat(fd).st_size, 0)))
        os.close(fd)
        memory = aligned(place.nbytes)
        try:
            self.slots.read(place, memory)
        except SwapMiss as miss:
            return {"weights_from": "source", "missed": miss.reason}
        if memory != b"\1" * place.nbytes:
            raise TransitionError("what the swap store holds is not this model's")
        return {"weights_from": "nvme"}

    async def demote(self, message: control.Message, fd: int | None) -> control.Message:
        began = time.monotonic()
        self.resident = False
        await asyncio.sleep(self.knobs.demote_s)
        await self.fault("demote")
        released = await asyncio.to_thread(self._give)
        return {
            "released_bytes": released,
            "host_bytes": self.knobs.host_bytes + self.knobs.aside_bytes,
            "total_s": time.monotonic() - began,
            "private_bytes": private_bytes(os.getpid()),
        }

    async def balloon(self, message: control.Message, fd: int | None) -> control.Message:
        """Of the KV, all but an eighth may go while nobody is inside, a half while somebody is; then layers."""
        await self.fault("balloon")
        piece, kv_bytes = self.knobs.piece_bytes, self.knobs.kv_bytes
        nbytes = -(-int(message["bytes"]) // piece) * piece
        most = self.gift + self.knobs.layer_bytes
        if nbytes > most or (message["gently"] and nbytes - self.ballooned > self.spare):
            raise TransitionError(f"{nbytes} bytes can't be given up")
        if self.resident:
            if nbytes < self.ballooned:
                self.account.take(self.ballooned - nbytes)
            elif not self.knobs.kept_bytes:
                self.account.give(nbytes - self.ballooned)
            self.taken -= nbytes - self.ballooned
        self.ballooned = nbytes
        return {"ballooned_bytes": nbytes, "kv_bytes": kv_bytes - min(nbytes, self.gift), "total_s": 0.0}

    @property
    def gift(self) -> int:
        return self.knobs.kv_bytes - self.knobs.kv_bytes // 8

    @property
    def spare(self) -> int:
        share = 2 if self.in_flight else 8
        return max(0, self.knobs.kv_bytes - self.knobs.kv_bytes // share - self.ballooned)

    async def set_threads(self, message: control.Message, fd: int | None) -> control.Message:
        self.threads = int(message["threads"])
        return {}

    async def attach(self, message: control.Message, fd: int | None) -> control.Message:
        if fd is None:
            raise CheckpointError("no descriptor came with the image", file=self.spec.path)
        if self.spec.starts_awake and not self.resident and message["state"] == "empty":
            raise TransitionError("it would be an image of nothing")
        if self.spec.starts_awake and message["state"] == "ready" and message["key"] != self.image_key:
            raise TransitionError("it is of another process's memory")
        self.image = fd
        if message["state"] == "ready":
            self.image_ready = True
            return {"bytes": os.fstat(fd).st_size, "fill_s": 0.0}
        self.unwanted.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.knobs.image_s):
                await self.unwanted.wait()
        await self.fault("image")
        nbytes = 0 if self.unwanted.is_set() else await asyncio.to_thread(_fill, fd)
        if self.unwanted.is_set():
            os.close(fd)
            self.image = None
            raise Cancelled("the image is not wanted any more")
        self.image_ready = True
        return {"bytes": nbytes, "fill_s": self.knobs.image_s, "key": self.image_key}

    async def drop_image(self, message: control.Message, fd: int | None) -> control.Message:
        await self.fault("drop_image")
        self.unwanted.set()
        if self.image is not None and self.image_ready:
            os.close(self.image)
            self.image, self.image_ready = None, False
        return {}

    async def swap(self, message: control.Message, fd: int | None) -> control.Message:
        if fd is None:
            raise CheckpointError("no descriptor came with the swap store", file=self.spec.path)
        self.slots = Slots.from_wire(fd, message["slots"])
        if self.knobs.leases and self.asker is not None:
            wants = [
                {"key": digest(self.spec.model, str(n)).hex(), "nbytes": 1, "saved_s": 1.0, "rate": 1.0}
                for n in range(self.knobs.leases)
            ]
            await self.asker.call("swap.lease", deadline_s=30, model=digest(self.spec.model).hex(), wants=wants)
        return {}

    async def canary(self, message: control.Message, fd: int | None) -> control.Message:
        await self.fault("canary")
        return {"ok": self.resident, "total_s": 0.0}

    async def status(self, message: control.Message, fd: int | None) -> control.Message:
        return {
            "resident": self.resident,
            "in_flight": self.in_flight,
            "asked": self.asked,
            "from_image": self.image_ready,
            "environment": dict(os.environ),
            "drawn": drawn(),
            "threads": self.threads,
            "spare_bytes": self.spare if self.knobs.balloons else 0,
            "layer_bytes": max(0, self.knobs.layer_bytes - max(0, self.ballooned - self.gift)),
            "layer_s": self.knobs.layer_s,
        }

    async def stop(self, message: control.Message, fd: int | None) -> control.Message:
        await self.fault("stop")
        self.stopped.set()
        return {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if not self.resident:
            return web.json_response({"error": {"message": "the weights are not on the device"}}, status=503)
        body = await request.json()
        self.asked = {name.lower(): value for name, value in request.headers.items()}
        self.in_flight += 1
        try:
            await self.fault("request")
            if self.taken < self.held and self.spec.starts_awake:
                await asyncio.to_thread(self._take, self.held - self.taken)
            if request.path == "/v1/embeddings":
                inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
                data = [{"object": "embedding", "index": i, "embedding": [0.6, 0.8]} for i in range(len(inputs))]
                usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
                return web.json_response({"object": "list", "model": self.spec.model, "data": data, "usage": usage})
            if body.get("stream"):
                return await self._stream(request)
            await asyncio.sleep(self.knobs.token_s * self.knobs.tokens)
            return web.json_response(self._whole(request.path, "".join(self._tokens())))
        finally:
            self.in_flight -= 1

    def _tokens(self) -> list[str]:
        return [f"{self.spec.model} "] + [f"{i} " for i in range(1, self.knobs.tokens)]

    def _whole(self, path: str, text: str) -> dict[str, Any]:
        chat = path == "/v1/chat/completions"
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {
            "id": "fake-1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": self.spec.model,
            "choices": [{"index": 0, **said, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": self.knobs.tokens,
                "total_tokens": 1 + self.knobs.tokens,
            },
        }

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        chat = request.path == "/v1/chat/completions"
        tokens = self._tokens()
        for i, token in enumerate(tokens):
            said = {"delta": {"content": token}} if chat else {"text": token}
            end = "stop" if i + 1 == len(tokens) else None
            chunk = {
                "id": "fake-1",
                "object": "chat.completion.chunk" if chat else "text_completion",
                "created": 0,
                "model": self.spec.model,
                "choices": [{"index": 0, **said, "finish_reason": end}],
            }
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await asyncio.sleep(self.knobs.token_s)
        await response.write(b"data: [DONE]\n\n")
        await self.fault("done")
        return response

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "in_flight": self.in_flight})

    async def run(self, control_fd: int) -> None:
        app = web.Application()
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses"):
            app.router.add_post(path, self.answer)
        app.router.add_get("/health", self.health)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, self.spec.socket_path).start()
        channel = control.Channel(socket.socket(fileno=control_fd))
        await asyncio.sleep(self.knobs.start_s)
        if self.knobs.cannot_start:
            await channel.send({"event": "failed", "error": self.knobs.cannot_start})
            return
        await self.fault("start")
        await channel.send(await self.hello())
        verbs: dict[str, Callable[[control.Message, int | None], Awaitable[control.Message]]] = {
            "promote": self.promote,
            "demote": self.demote,
            "balloon": self.balloon,
            "threads": self.set_threads,
            "image": self.attach,
            "drop_image": self.drop_image,
            "swap": self.swap,
            "canary": self.canary,
            "status": self.status,
            "stop": self.stop,
        }
        self.asker = control.Asker(channel)
        serving = asyncio.create_task(control.serve(channel, verbs, self.asker))
        stopping = asyncio.create_task(self.stopped.wait())
        await asyncio.wait({stopping} if self.knobs.lone else {serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        # The answer to the stop verb is to get out first.
        await asyncio.sleep(0.02)
        serving.cancel()
        await runner.cleanup()


def _fill(fd: int) -> int:
    nbytes = os.fstat(fd).st_size
    for start in range(0, nbytes, MiB):
        os.pwrite(fd, b"\1" * min(MiB, nbytes - start), start)
    return nbytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--spec", required=True)
    arguments = parser.parse_args()
    prctl.die_with_parent()
    poll = select.poll()
    poll.register(arguments.control_fd, select.POLLHUP)
    if poll.poll(0):
        sys.exit("the manager ended before the signal of its death was set")
    spec = WorkerSpec.from_json(arguments.spec)
    work(spec, arguments.control_fd, "started")


def drawn() -> tuple[float, ...]:
    """From every random state that there is."""
    numpy = sys.modules.get("numpy")
    return (random.random(), *([float(numpy.random.random())] if numpy else []))


def work(spec: WorkerSpec, control_fd: int, how: str) -> None:
    knobs = Knobs.from_environment()
    if knobs.lone:
        libc.LIBC.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    if knobs.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if knobs.orphan and os.fork() == 0:
        if knobs.leaves_group:
            os.setsid()
        while True:
            signal.pause()
    sys.stdout.write(f"fake worker {spec.model}, {how}\n")
    sys.stdout.flush()
    asyncio.run(FakeWorker(spec, knobs).run(control_fd))


if __name__ == "__main__":
    main()
