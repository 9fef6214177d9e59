"""A zygote that forks fake workers: the real one's forks without its imports, with faults on demand.

A fault is `threads` (it has two), `mute` (it says no hello), `ends` (at once) or `hangs` (it never answers).
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import threading

import numpy.random  # noqa: F401 - it has a random state, and threads where it is let

from mball.server.worker import zygote
from tests import fake_worker


def command(fault: str = "") -> list[str]:
    return [sys.executable, "-m", "tests.fake_zygote", "--fault", fault]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--fault", default="")
    parser.add_argument("--room", default="")
    arguments = parser.parse_args()
    sock = socket.socket(fileno=arguments.control_fd)
    match arguments.fault:
        case "ends":
            sys.exit(3)
        case "mute":
            signal.pause()
        case "threads":
            threading.Thread(target=threading.Event().wait, daemon=True).start()
    if not zygote.greet(sock):
        sys.exit(1)
    if arguments.fault == "hangs":
        signal.pause()
    work = zygote.attend(sock)
    if work is not None:
        fake_worker.work(work.spec, work.control_fd, "forked")


if __name__ == "__main__":
    main()
