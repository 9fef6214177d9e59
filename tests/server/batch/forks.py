"""`mball ARGUMENTS…` many times over, each in a process of its own that need not import anything first.

Arguments come as a JSON list a line on stdin; the process id, and once it has ended its exit code, go to stdout.
"""

from __future__ import annotations

import json
import os
import sys

import aiohttp  # noqa: F401 - for the forks
import rich.progress  # noqa: F401

import mball.server.batch.run  # noqa: F401
from mball.server.cli import main

for line in sys.stdin:
    if (pid := os.fork()) == 0:
        sys.argv = ["mball", *json.loads(line)]
        sys.stdout = sys.stderr
        main()
        sys.exit(0)
    sys.stdout.write(f"{pid}\n")
    sys.stdout.flush()
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
    sys.stdout.flush()
