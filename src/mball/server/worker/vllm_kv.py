"""vLLM's plugin for its KV tier; imports nothing of vLLM before it is called."""

from __future__ import annotations

import os
from functools import cache

from mball.loader import vllm_compat
from mball.loader.vllm_names import KV_ENVIRONMENT, KV_TIER, KV_TIER_CLASS, KV_TIER_MODULE

_SEED = "1"


@cache
def register() -> None:
    """The entry point in `vllm.general_plugins`: runs in every process of vLLM's. Raises EngineUnsupported."""
    if not os.environ.get(KV_ENVIRONMENT):
        return
    # Names of blocks begin with it: 0.26 draws it anew in every process otherwise. They are cryptographic digests
    # (`vllm_options` sees to that), so it need not be secret.
    os.environ.setdefault("PYTHONHASHSEED", _SEED)
    vllm_compat.tiering().register(KV_TIER, KV_TIER_MODULE, KV_TIER_CLASS)
