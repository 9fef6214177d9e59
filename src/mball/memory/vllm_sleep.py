"""vLLM's sleep mode by images: its memory is unmapped without being copied, and comes back by one copy over the bus.

`register` is an entry point of vLLM's and imports nothing of it before it is called. The classes for a GPU are made by
`vllm_cuda`.
"""

from __future__ import annotations

import os
from functools import cache

from mball.loader import vllm_compat
from mball.loader.vllm_names import SLEEP_ENVIRONMENT


@cache
def register() -> None:
    """The entry point in `vllm.general_plugins`: runs in every process of vLLM's. Raises EngineUnsupported."""
    if os.environ.get(SLEEP_ENVIRONMENT) != "1":
        return
    if vllm_compat.on_cpu():
        vllm_compat.allow_sleep_on_cpu()
    else:
        vllm_compat.sleeping().use("mball.memory.vllm_cuda", "ImageBackend")
