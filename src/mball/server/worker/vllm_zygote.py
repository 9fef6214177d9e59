"""`python -m mball.server.worker.vllm_zygote --control-fd N …`: has vLLM imported, and forks workers that serve by it.

A worker forks its server before it has a thread of its own, and the server its engine: none of them imports anything
again. Runs in vLLM's interpreter.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from mball.device import prctl
from mball.loader import vllm_compat
from mball.server.worker import vllm_process, vllm_server, zygote
from mball.server.worker.vllm_forked import ForkedServer


def main() -> int:
    # vLLM looks at it while it is imported, and keeps what it found. Looking begins no CUDA.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return zygote.run("mball.server.worker.vllm_zygote", vllm_compat.import_server, _work)


def _work(work: zygote.Work) -> int:
    """In a worker, or in its server."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        prctl.die_with_parent()
        os.close(tell)
        os.close(work.control_fd)
        return _serve(told)
    os.close(told)
    return asyncio.run(vllm_process.run(work.control_fd, work.spec, ForkedServer(pid, tell).begin))


def _serve(told: int) -> int:
    """Nothing, where the worker ends before it says what."""
    with os.fdopen(told, "rb") as pipe:
        text = pipe.read()
    if not text:
        return 0
    given = json.loads(text)
    os.environ.clear()
    os.environ.update(given["environment"])
    sys.argv = ["vllm", *given["arguments"]]
    vllm_server.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
