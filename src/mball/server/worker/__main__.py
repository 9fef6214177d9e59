"""`python -m mball.server.worker --control-fd N --spec JSON`: one model, started by the manager."""

from __future__ import annotations

import argparse
import asyncio
import sys

from mball.device import prctl
from mball.memory.spec import WorkerSpec
from mball.server.log import configure_logging
from mball.server.worker import imports


def main() -> int:
    parser = argparse.ArgumentParser(prog="mball.server.worker", description=__doc__)
    parser.add_argument("--control-fd", type=int, required=True, help="the worker's end of the control channel")
    parser.add_argument("--spec", type=WorkerSpec.from_json, required=True, help="what to serve, as JSON")
    arguments = parser.parse_args()
    prctl.die_with_parent()
    imports.import_all()
    from mball.server.worker import process

    configure_logging()
    return asyncio.run(process.run(arguments.control_fd, arguments.spec))


if __name__ == "__main__":
    sys.exit(main())
