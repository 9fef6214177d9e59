"""A gateway over fake workers in a fork for each line on stdin, all behind one socket: to be killed.

Arguments: the socket's descriptor, the folder of files, and one for the rest.
"""

from __future__ import annotations

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
from tests.server.forking import forked


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


if __name__ == "__main__":
    sock = socket.socket(fileno=int(sys.argv[1]))
    for line in forked(sys.stdin):
        serve(sock, Path(sys.argv[2]), Path(sys.argv[3]) / line.strip())
