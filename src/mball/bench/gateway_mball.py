"""MBALL's gateway as `mball serve` runs it, all of it on, over a worker program that answers at once."""

from __future__ import annotations

import argparse
import hashlib
import socket
import sys
from pathlib import Path

from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec, WorkerSpec
from mball.server.config import Config, KeyConfig, LimitsConfig
from mball.server.log import configure_logging
from mball.server.run import serve
from mball.units import GiB

_OPEN = 2000


def _manager(folder: Path, runtime_dir: Path) -> Manager:
    spec = ModelSpec(WorkerSpec(model="bench", path=str(folder)), preload=True, max_in_flight=_OPEN)
    return Manager(
        [spec],
        [(SimulatedDevice.create(folder / "device", GiB), GiB)],
        dram_bytes=0,
        runtime_dir=runtime_dir,
        command_for=lambda _: [sys.executable, "-m", "mball.bench.gateway_worker"],
        settings=Settings(max_queue=_OPEN),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--key", required=True)
    arguments = parser.parse_args()
    configure_logging()
    limits = LimitsConfig(max_in_flight=_OPEN, requests_per_minute=10**9)
    others = [KeyConfig(name=f"other-{n}", sha256=hashlib.sha256(b"%d" % n).hexdigest()) for n in range(9)]
    mine = KeyConfig(name="bench", admin=True, sha256=hashlib.sha256(arguments.key.encode()).hexdigest(), limits=limits)
    config = Config(api_keys=(*others, mine), runtime_dir=arguments.folder / "run", drain_timeout_s=1)
    serve(
        config, socket.socket(fileno=arguments.fd), build=lambda _, runtime_dir: _manager(arguments.folder, runtime_dir)
    )


if __name__ == "__main__":
    main()
