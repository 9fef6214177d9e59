"""`python -m mball.server.worker.zygote --control-fd N …`: has done a worker's imports, and forks workers on demand.

Its side of `mball.memory.zygote`. No thread is missed and CUDA has not begun at a fork, or it forks nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mball.device import prctl
from mball.errors import MballError, TransitionError
from mball.memory.control import MESSAGE_BYTES
from mball.memory.spec import WorkerSpec
from mball.memory.worker_log import open_log
from mball.server.worker import imports
from mball.server.worker.forking import unfit

_FAILED = 70


@dataclass(frozen=True, slots=True)
class Work:
    """What a forked worker is to do."""

    control_fd: int
    spec: WorkerSpec


def main() -> int:
    return run("mball.server.worker.zygote", imports.import_all, _work)


def run(module: str, import_all: Callable[[], None], work: Callable[[Work], int]) -> int:
    """The exit code, of the zygote or of a worker. `module` is what the zygote was run as, `import_all` what it does
    once for the workers, each of which does its `work`."""
    parser = argparse.ArgumentParser(prog=module)
    parser.add_argument("--control-fd", type=int, required=True, help="the zygote's end of the control channel")
    # Room for the command line that a worker shows, which can't grow.
    parser.add_argument("--room", default="", help=argparse.SUPPRESS)
    sock = socket.socket(fileno=parser.parse_args().control_fd)
    prctl.die_with_parent()
    try:
        import_all()
    except (MballError, ImportError) as error:
        _say(sock, {"event": "failed", "error": f"its imports failed: {error}"})
        return 1
    if not greet(sock):
        return 1
    given = attend(sock)
    return 0 if given is None else work(given)


def greet(sock: socket.socket) -> bool:
    """Says that it may fork, or why not; whether it may."""
    reason = unfit()
    _say(sock, {"event": "failed", "error": reason} if reason else {"event": "hello", "pid": os.getpid()})
    # Collections in the workers leave alone what they share with this process: its pages stay shared.
    gc.collect()
    gc.freeze()
    return reason is None


def _work(work: Work) -> int:
    from mball.server.log import configure_logging
    from mball.server.worker import process

    configure_logging()
    return asyncio.run(process.run(work.control_fd, work.spec))


def _target(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except FileNotFoundError:
        return ""


def attend(sock: socket.socket) -> Work | None:
    """Forks a worker for every message. Returns None when the manager is gone, and a worker's work in each worker."""
    while True:
        data, fds, _, _ = socket.recv_fds(sock, MESSAGE_BYTES, 1)
        if not data:
            return None
        message = json.loads(data)
        try:
            if reason := unfit():
                raise TransitionError(reason)
            work = _fork(sock, message, fds[0])
        except (OSError, TransitionError) as error:
            _say(sock, {"id": message["id"], "error": {"type": type(error).__name__, "message": str(error)}})
            work = None
        if work is not None:
            return work
        for fd in fds:
            os.close(fd)


def _fork(sock: socket.socket, message: dict[str, Any], control_fd: int) -> Work | None:
    """Forks twice: the middle process ends, so that the manager adopts the worker. None in this process."""
    told_read, told_write = os.pipe()
    go_read, go_write = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            if (pid := os.fork()) != 0:
                os.write(told_write, str(pid).encode())
                os._exit(0)
            os.close(go_write)
            return _begin(message, control_fd, go_read)
        except BaseException:  # noqa: BLE001 - whatever it is, nothing of this may go on as a second zygote
            traceback.print_exc()
            os._exit(_FAILED)
    os.close(told_write)
    os.close(go_read)
    try:
        os.waitpid(middle, 0)
        told = os.read(told_read, 32)
        if not told:
            raise TransitionError("the second fork failed; its log has the reason")
        _say(sock, {"id": message["id"], "result": {"pid": int(told)}})
        # The manager knows of it: only now may it begin. Should this process end before, it ends too.
        os.write(go_write, b"1")
    finally:
        os.close(told_read)
        os.close(go_write)
    return None


def _begin(message: dict[str, Any], control_fd: int, go_fd: int) -> Work:
    """In the worker: everything that it is not to share with others."""
    manager = int(message["manager"])
    if not os.read(go_fd, 1):
        os._exit(_FAILED)
    prctl.die_with_parent()
    if os.getppid() != manager:
        os._exit(_FAILED)
    os.setsid()
    spec = WorkerSpec.from_json(message["spec"])
    prctl.set_command_line(
        ["mball.server.worker", "--control-fd", str(control_fd), "--spec", spec.to_json()], f"mball {spec.model}"
    )
    _redirect(message["log"])
    _close_all_but(control_fd)
    environment = merged(message["environment"], message["zygote_environment"], dict(os.environ))
    os.environ.clear()
    os.environ.update(environment)
    _reseed()
    return Work(control_fd, spec)


def merged(given: Mapping[str, str], before: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """A worker's environment: what the manager gives it, and what the zygote's `own` has that was not given `before`.
    A script that stands for an interpreter sets what that needs, and modules set some when they are imported."""
    return {**given, **{name: value for name, value in own.items() if before.get(name) != value}}


def _redirect(log: str) -> None:
    for target, fd in ((0, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)), (1, open_log(Path(log)))):
        os.dup2(fd, target)
        os.close(fd)
    os.dup2(1, 2)


def _close_all_but(control_fd: int) -> None:
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        # NVML goes on by the numbers of its own.
        if (fd := int(name)) > 2 and fd != control_fd and not _target(fd).startswith("/dev/nvidia"):
            try:
                os.close(fd)
            except OSError:
                continue  # the listing's own


def _reseed() -> None:
    """What the imports seeded would be the same in every worker. (`random` sees to itself.)"""
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
    if (torch := sys.modules.get("torch")) is not None:
        torch.seed()


def _say(sock: socket.socket, message: dict[str, Any]) -> None:
    sock.send(json.dumps(message).encode())


if __name__ == "__main__":
    sys.exit(main())
