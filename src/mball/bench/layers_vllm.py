"""vLLM with a part of its layers offloaded to host memory and prefetched, run by an interpreter that has vLLM and need
not have MBALL: `python -P layers_vllm.py SPEC`; it speaks as mball.bench.contenders does.

The options are those of `vllm/config/offload.py` (0.26 to 0.33): of every group of layers the last ones are offloaded.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

_PROMPT = list(range(5, 37))
_WARM_TOKENS = 8
_LEAST_STEPS = 3
_MOST_IN_GROUP = 8
_KV_BYTES = 1 << 30
_PREFETCH_STEP = 1
_ENVIRONMENT = {
    # One process, which the benchmark can end and whose device memory it can see.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The newer model runner takes the options and offloads nothing (seen in 0.26).
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def groups(share: float) -> tuple[int, int]:
    """Layers in a group, and how many of them are offloaded, for the nearest share that groups of eight can have."""
    part = max(Fraction(1, _MOST_IN_GROUP), Fraction(share).limit_denominator(_MOST_IN_GROUP))
    return part.denominator, part.numerator


def measure(spec: dict[str, Any], vllm: Any) -> dict[str, Any]:
    import torch

    size, offloaded = groups(spec["streamed_share"])
    llm = vllm.LLM(
        model=spec["path"],
        skip_tokenizer_init=True,
        max_model_len=len(_PROMPT) + spec["steps"] + _WARM_TOKENS + 1,
        max_num_seqs=1,
        kv_cache_memory_bytes=_KV_BYTES,
        enforce_eager=True,
        seed=0,
        offload_backend="prefetch",
        offload_group_size=size,
        offload_num_in_group=offloaded,
        offload_prefetch_step=_PREFETCH_STEP,
    )

    def generate(tokens: int) -> float:
        params = vllm.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": _PROMPT}], params, use_tqdm=False)
        return time.perf_counter() - began

    step_s, steps = step_time(generate, spec["steps"], spec["limit_s"])
    offloader = importlib.import_module("vllm.model_executor.offloader").get_offloader()
    if not (offloaded_bytes := getattr(offloader, "total_offloaded_bytes", 0)):
        return {"cannot": f"vLLM {vllm.__version__} took the options, and offloaded nothing"}
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return {
        "step_s": step_s,
        "tokens_s": 1 / step_s,
        "device_bytes": total_bytes - free_bytes,
        "offloaded_bytes": offloaded_bytes,
        "steps": steps,
        "facts": {
            "streamed": f"{offloaded} of every {size} layers",
            "version": vllm.__version__,
            "prefetch_step": _PREFETCH_STEP,
            "eager": True,
        },
    }


def step_time(generate: Callable[[int], float], steps: int, limit_s: float) -> tuple[float, int]:
    """Seconds between two tokens, prefill left out, and over how many; `generate` takes a number of tokens."""
    generate(_WARM_TOKENS)
    guess_s = generate(_WARM_TOKENS) / _WARM_TOKENS
    steps = max(_LEAST_STEPS, min(steps, int(limit_s / guess_s)))
    first_s = min(generate(1) for _ in range(2))
    return (generate(1 + steps) - first_s) / steps, steps


def main(argument: str) -> dict[str, Any]:
    os.environ.update(_ENVIRONMENT)
    try:
        import torch

        vllm = importlib.import_module("vllm")
    except ImportError as error:
        return {"cannot": f"no vLLM in {sys.executable} ({error})"}
    if not torch.cuda.is_available():
        return {"cannot": f"torch {torch.__version__} finds no GPU here"}
    _say("ready")
    if not sys.stdin.readline():
        return {"cannot": "it was not wanted any more"}
    try:
        return measure(json.loads(argument), vllm)
    except (RuntimeError, ValueError, TypeError, OSError, AttributeError) as error:
        return {"cannot": f"{type(error).__name__}: {error}"}


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _say(json.dumps(main(sys.argv[1])))
    os._exit(0)
