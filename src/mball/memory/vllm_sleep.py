"""vLLM's sleep mode by images: its memory is unmapped without being copied, and comes back by one copy over the bus.

`register` is an entry point of vLLM's and imports nothing of it before it is called. The classes for a GPU are made by
`vllm_cuda`.
"""

from __future__ import annotations

import os
import time
from functools import cache

from mball.loader import vllm_compat
from mball.loader.vllm_names import FORK_ENVIRONMENT, SERVER_ENVIRONMENT, SLEEP_ENVIRONMENT


@cache
def register() -> None:
    """The entry point in `vllm.general_plugins`: runs in every process of vLLM's. Raises EngineUnsupported."""
    if os.environ.get(SLEEP_ENVIRONMENT) != "1":
        return
    os.environ.setdefault(SERVER_ENVIRONMENT, str(time.monotonic()))
    if vllm_compat.on_cpu():
        vllm_compat.allow_sleep_on_cpu()
        if os.environ.get(FORK_ENVIRONMENT) == "1":
            vllm_compat.fork_engine()
    else:
        vllm_compat.sleeping().use("mball.memory.vllm_cuda", "ImageBackend")
