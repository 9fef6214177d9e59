"""A gateway over fake workers, to be killed: a process of its own for each line on stdin, all behind one socket.

Its process id, and once it has ended its exit code, go to stdout. Arguments: the socket's descriptor, the folder of
files, and one for the rest.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import uvicorn

from mball.device.device import open_devices
from mball.memory.manager import Manager
from mball.server.config import Config
from mball.server.gateway.app import create_app
from mball.units import GiB, MiB
from tests.fake_worker import Knobs, command
from tests.memory.conftest import QUICK, model


def serve(sock: socket.socket, files: Path, runtime_dir: Path) -> None:
    small = Knobs(weights_bytes=MiB, kv_bytes=MiB)
    manager = Manager(
        [model(name, small) for name in "ab"],
        [(device, GiB) for device in open_devices(("cpu",))],
        dram_bytes=0,
        runtime_dir=runtime_dir,
        command_for=lambda _: command(),
        settings=QUICK,
    )
    app = create_app(manager, Config(files={"path": files}))
    uvicorn.Server(uvicorn.Config(app, log_config=None)).run([sock])


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            os.dup2(2, 1)
            serve(sock, Path(sys.argv[2]), Path(sys.argv[3]) / line.strip())
            sys.exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
