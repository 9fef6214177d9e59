"""A worker's life: open the model, listen, say hello, answer until told to stop or until nobody is there to tell."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path

import structlog
import torch
import uvicorn

from mball.device.account import open_account
from mball.errors import MballError
from mball.memory import control
from mball.memory.spec import WorkerSpec
from mball.server.engine import footprint, open_engine
from mball.server.worker.app import create_app
from mball.server.worker.manners import stopped_by_signals
from mball.server.worker.service import Service
from mball.server.worker.threads import in_thread
from mball.server.worker.tokenizer import Tokenizer
from mball.server.worker.verbs import Verbs, trimmed_private_bytes

EXIT_TIMEOUT_S = 8.0
"""From the first word of stopping to the end of the process, whatever hangs."""
_GRACE_S = 2

_log = structlog.get_logger(__name__)


async def run(control_fd: int, spec: WorkerSpec) -> int:
    """The exit code: 0 after a stop, 1 where the model could not be opened (the manager was told why)."""
    stopping = asyncio.Event()
    channel = control.Channel(socket.socket(fileno=control_fd))
    with stopped_by_signals(stopping), contextlib.closing(channel):
        try:
            service = _open(spec)
            # What is there now stays: each later collection, one a demotion, looks at new objects alone.
            gc.collect()
            gc.freeze()
            asker = control.Asker(channel)
            verbs = Verbs(service, channel, stopping.set, asker)
            hello = _hello(service)
            listener = _listen(spec.socket_path)
        except (MballError, OSError, ValueError, RuntimeError, ImportError) as error:
            _log.error("cannot start", model=spec.model, error=repr(error))
            with contextlib.suppress(control.ChannelClosed):
                text = f"{type(error).__name__}: {error}"
                await channel.send({"event": "failed", "error": text[:4000]})
            return 1
        manager = _answer_manager(channel, hello, verbs, asker)
        try:
            await _serve(service, listener, manager, stopping)
        finally:
            verbs.close()
    return 0


def _open(spec: WorkerSpec) -> Service:
    torch.set_num_threads(spec.threads)
    account = open_account(spec.device)
    tokenizer = Tokenizer(spec.path, trust_remote_code=spec.trust_remote_code)
    return Service(spec, open_engine(spec, account), tokenizer)


def _hello(service: Service) -> control.Message:
    """Told once everything that stays is there: tokenizer, module, threads."""
    needs, key = footprint(service.spec), service.engine.image_key()
    return {
        "event": "hello",
        "pid": os.getpid(),
        "baseline_bytes": trimmed_private_bytes(),
        "weights_bytes": needs.weights_bytes,
        "kv_bytes": needs.kv_bytes,
        "working_bytes": needs.activation_bytes,
        "layer_bytes": needs.layer_bytes,
        "image_bytes": service.engine.image_bytes,
        "host_bytes": service.engine.status().host_bytes,
        "image_key": None if key is None else key.hex(),
    }


async def _answer_manager(channel: control.Channel, hello: control.Message, verbs: Verbs, asker: control.Asker) -> None:
    """Returns when the manager's end closes."""
    with contextlib.suppress(control.ChannelClosed):
        await channel.send(hello)
    await control.serve(channel, verbs.table(), asker)


def _listen(path: str) -> socket.socket:
    """Nobody but this user may connect: the socket is made under a mask, never open for a moment."""
    _remove(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{path}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    return sock


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """Signals are the worker's own business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    service: Service, listener: socket.socket, answer_manager: Coroutine[None, None, None], stopping: asyncio.Event
) -> None:
    server = _Server(
        uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=600,
        )
    )
    http = asyncio.create_task(server.serve([listener]), name="http")
    manager = asyncio.create_task(answer_manager, name="control")
    stop = asyncio.create_task(stopping.wait(), name="stop")
    await asyncio.wait({http, manager, stop}, return_when=asyncio.FIRST_COMPLETED)
    for part in (http, manager):
        if part.done() and (error := part.exception()) is not None:
            _log.error("broken", model=service.spec.model, part=part.get_name(), exc_info=error)
    _bound_the_exit()
    _log.info("stopping", model=service.spec.model, asked=stopping.is_set())
    _remove(service.spec.socket_path)
    service.close()
    server.should_exit = True
    await asyncio.wait({http})
    # A promotion under way can't be stopped; it ends, or the process does. The manager is still asked for slots, for
    # the KV that goes to the store now.
    await in_thread(service.engine.close)
    for task in (manager, stop):
        task.cancel()
    await asyncio.wait({manager, stop})
    for part in (http, manager):
        if not part.cancelled() and (error := part.exception()) is not None:
            raise error


def _bound_the_exit() -> None:
    """Threads that hang in a read or a kernel can't be ended; the process can."""

    def end() -> None:
        _log.error("still not stopped; ending the process", after_s=EXIT_TIMEOUT_S)
        os._exit(70)

    timer = threading.Timer(EXIT_TIMEOUT_S, end)
    timer.daemon = True
    timer.start()
