"""`python -m mball.server.worker.vllm_server MODEL OPTIONS`: vLLM's own OpenAI server, which ends with its parent.

All is imported once: the engine's processes are forked from the server's, where vLLM would import it again in each.
"""

from __future__ import annotations

import os
import runpy
import sys

from mball.device import prctl
from mball.loader import vllm_compat
from mball.loader.vllm_names import FORK_ENVIRONMENT, METHOD_ENVIRONMENT
from mball.memory.launch import THREADS_ENVIRONMENT
from mball.server.worker.forking import unfit


def imported() -> None:
    """Without the threads that the environment asks for: what is spawned later has them. Raises EngineUnsupported."""
    given = {name: os.environ.get(name) for name in THREADS_ENVIRONMENT}
    os.environ |= dict.fromkeys(THREADS_ENVIRONMENT, "1")
    vllm_compat.import_server()
    for name, count in given.items():
        if count is None:
            del os.environ[name]
        else:
            os.environ[name] = count


def main() -> None:
    """In a process that has its imports done. Raises EngineUnsupported."""
    prctl.die_with_parent()
    # The socket and whatever else is made is this user's alone.
    os.umask(0o077)
    if reason := unfit():
        sys.stderr.write(f"vLLM's engine is not forked, which takes some seconds more: {reason}\n")
    elif os.environ.setdefault(METHOD_ENVIRONMENT, "fork") == "fork":
        os.environ[FORK_ENVIRONMENT] = "1"
    # Not as `__main__` to the processes that it spawns: those would import all of the server again.
    runpy.run_module(vllm_compat.server_module(), run_name="__main__")


if __name__ == "__main__":
    sys.argv[0] = "vllm"
    imported()
    main()
