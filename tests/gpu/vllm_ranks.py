"""One model by several ranks on as many GPUs: run by an interpreter that has vLLM.

    python tests/gpu/vllm_ranks.py MODEL_FOLDER LOAD_FORMAT [RANKS]

Its last line is JSON: the tokens, and the seconds until they were there. What loading took is in vLLM's log. PYTHONPATH
is as in vllm_check.py.
"""

from __future__ import annotations

import json
import sys
import time


def main(model: str, load_format: str, ranks: int) -> dict[str, object]:
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(
        model,
        load_format=load_format,
        tensor_parallel_size=ranks,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 30,
        disable_custom_all_reduce=True,
    )
    greedy = SamplingParams(max_tokens=32, temperature=0, detokenize=False)
    [answer] = llm.generate([{"prompt_token_ids": list(range(5, 40))}], greedy)
    seconds = time.perf_counter() - began
    return {"load_format": load_format, "seconds": round(seconds, 1), "tokens": list(answer.outputs[0].token_ids)}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else 2)) + "\n")
