"""`mball ARGUMENTS…` in a fork for each JSON list of arguments on stdin."""

from __future__ import annotations

import json
import sys

import aiohttp  # noqa: F401 - for the forks
import rich.progress  # noqa: F401

import mball.server.batch.run  # noqa: F401
from mball.server.cli import main
from tests.server.forking import forked

for line in forked(sys.stdin):
    sys.argv = ["mball", *json.loads(line)]
    main()
