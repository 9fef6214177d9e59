"""The step loop of mball against transformers' own continuous batching and a static `generate`, on one CPU.

    .venv/bin/python docs/design/engine_spike.py .demo/models/smollm2-135m --dtype float32

Each contender runs in a process of its own, in turn, several rounds; in fp32 the tokens must be the same. A table goes
to stdout and, with --json, everything measured to a file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("mball", "transformers", "generate")
TOKENS = 64
PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "Gravity is the force that",
    "Here is how to boil an egg: first,",
    "In 1492 Columbus sailed across the ocean and",
    "My favourite book tells of a girl who lives by the sea; one day she",
    "Water boils at one hundred degrees",
    "A list of prime numbers: 2, 3, 5, 7, 11,",
]


def private_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


def run_mball(path: str, dtype: str, threads: int, prompts: list[list[int]]) -> Any:
    from mball.device.account import OpenAccount
    from mball.memory.spec import WorkerSpec
    from mball.server.engine import open_engine
    from mball.server.engine.api import GenerateRequest, Output, SamplingParams

    engine = open_engine(WorkerSpec("spike", path, "", "cpu", dtype=dtype, threads=threads), OpenAccount())
    engine.promote(None)

    def generate() -> list[list[int]]:
        done = threading.Semaphore(0)
        found: list[list[int]] = [[] for _ in prompts]

        def emit(tokens: list[int], output: Output) -> None:
            if output.token_id is not None:
                tokens.append(output.token_id)
            if output.finish_reason is not None:
                done.release()

        sampling = SamplingParams(max_tokens=TOKENS, seed=0, temperature=0)
        for index, prompt in enumerate(prompts):
            request = GenerateRequest(str(index), prompt, sampling)
            engine.submit(request, lambda output, tokens=found[index]: emit(tokens, output))
        for _ in prompts:
            done.acquire(timeout=300)
        return found

    return generate, engine.close


def run_transformers(path: str, dtype: str, threads: int, prompts: list[list[int]]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    manager = model.init_continuous_batching(
        GenerationConfig(max_new_tokens=TOKENS, do_sample=False),
        ContinuousBatchingConfig(max_memory_percent=0.1),
    )
    manager.start()

    async def all_of_them() -> list[list[int]]:
        loop = asyncio.get_running_loop()
        answers = []
        for index, prompt in enumerate(prompts):
            name = f"{time.monotonic_ns()}-{index}"
            answer = loop.create_future()
            manager.register_result_handler(name, lambda result, answer=answer: answer.set_result(result))
            manager.add_request(prompt, request_id=name, max_new_tokens=TOKENS, eos_token_id=-1)
            answers.append(answer)
        return [result.generated_tokens for result in await asyncio.wait_for(asyncio.gather(*answers), 300)]

    return lambda: asyncio.run(all_of_them()), lambda: manager.stop(block=True, timeout=60)


def run_generate(path: str, dtype: str, threads: int, prompts: list[list[int]]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}

    def generate() -> list[list[int]]:
        return model.generate(ids, attention_mask=mask, pad_token_id=0, **options)[:, width:].tolist()

    return generate, lambda: None


def contend(name: str, path: str, dtype: str, threads: int, repeats: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    generate, close = globals()[f"run_{name}"](path, dtype, threads, prompts)
    generate()
    rates = []
    cpu_ms = []
    for _ in range(repeats):
        began, cpu_began = time.perf_counter(), time.process_time()
        tokens = generate()
        count = sum(map(len, tokens))
        rates.append(count / (time.perf_counter() - began))
        cpu_ms.append(1000 * (time.process_time() - cpu_began) / count)
    result = {"rates": rates, "cpu_ms": cpu_ms, "tokens": tokens, "private_bytes": private_bytes()}
    close()
    json.dump(result, sys.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args.contender, args.path, args.dtype, args.threads, args.repeats)
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, args.path, "--dtype", args.dtype, "--threads", str(args.threads)]
            command += ["--repeats", str(args.repeats), "--contender", name]
            output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, timeout=1200).stdout
            results[name].append(json.loads(output))
    reference = results["generate"][0]["tokens"]
    print(f"{args.dtype}, {args.threads} threads, {len(PROMPTS)} x {TOKENS} tokens, {args.rounds} rounds")
    print(
        f"{'':14}{'tokens/s median':>17}{'min':>8}{'max':>8}{'CPU ms/token':>14}{'private MiB':>13}  tokens as generate's"
    )
    for name, rounds in results.items():
        rates = [rate for found in rounds for rate in found["rates"]]
        cpu_ms = statistics.median(value for found in rounds for value in found["cpu_ms"])
        private = max(found["private_bytes"] for found in rounds) >> 20
        equal = sum(ours == theirs for ours, theirs in zip(rounds[0]["tokens"], reference, strict=True))
        print(
            f"{name:14}{statistics.median(rates):17.1f}{min(rates):8.1f}{max(rates):8.1f}{cpu_ms:14.1f}{private:13}"
            f"  {equal} of {len(reference)} sequences"
        )
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "results": results}, indent=1))


if __name__ == "__main__":
    main()
