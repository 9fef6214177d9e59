"""`python -m mball.server.worker.vllm_server MODEL OPTIONS`: vLLM's own OpenAI server, which ends with its parent."""

from __future__ import annotations

import os
import runpy
import sys

from mball.device import prctl
from mball.loader import vllm_compat


def main() -> None:
    """Raises EngineUnsupported."""
    prctl.die_with_parent()
    # The socket and whatever else is made is this user's alone.
    os.umask(0o077)
    # Not as `__main__` to the processes that it spawns: those would import all of the server again.
    runpy.run_module(vllm_compat.server_module(), run_name="__main__")


if __name__ == "__main__":
    sys.argv[0] = "vllm"
    main()
