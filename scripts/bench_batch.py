"""`mball batch` beside `vllm run-batch`, on one engine and the same lines; starts of engines are left out of both.

The engine is vLLM on the CPU with MBALL's worker in both: it computes with the weights as they are loaded, as they
could not be taken from a packed copy (vLLM's own worker on the CPU packs them, and is faster by that).

    python scripts/bench_batch.py VLLM_PYTHON MODEL_FOLDER ROUNDS.jsonl

Each run appends a round. run-batch is timed from its progress bar's first line to its last, `mball batch` by its own
tally, from the first request to the last answer, on a server that has answered one request before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
import yaml

from mball.server.engine_path import search_path
from mball.server.run import running_server

LINES = 60
TOKENS = 64
SEQUENCES = 16
KV_BYTES = 96 * 1024**2
MAX_MODEL_LEN = 1024
TIMEOUT_S = 600.0


def lines(model: str) -> str:
    def body(number: int) -> dict[str, object]:
        ask = f"Write {number + 3} sentences on the river number {number}, and how it is on day {number * 7 % 31}."
        fixed = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        return {"model": model, "messages": [{"role": "user", "content": ask}], **fixed}

    line = {"method": "POST", "url": "/v1/chat/completions"}
    return "".join(json.dumps({"custom_id": str(n), **line, "body": body(n)}) + "\n" for n in range(LINES))


def run_batch(python: Path, model: Path, folder: Path) -> float:
    """Seconds."""
    source, target = folder / "in.jsonl", folder / "vllm.jsonl"
    source.write_text(lines(str(model)))
    command = [str(python), "-m", "vllm.entrypoints.openai.run_batch", "-i", str(source), "-o", str(target)]
    command += ["--model", str(model), "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(SEQUENCES)]
    command += ["--kv-cache-memory-bytes", str(KV_BYTES), "--enforce-eager", "--no-enable-prefix-caching"]
    command += ["--worker-cls", "mball.memory.vllm_cpu.SleepingCpuWorker"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2"}
    env["PYTHONPATH"] = search_path(folder / "path")
    began = ended = 0.0
    said = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env) as process:
        while process.stderr is not None and (piece := os.read(process.stderr.fileno(), 65536)):
            said = (said + piece.decode(errors="replace"))[-20000:]
            if "Running batch" in said and not began:
                began = time.monotonic()
            if f"{LINES}/{LINES}" in said and not ended:
                ended = time.monotonic()
        process.wait(60)
    if process.returncode != 0 or not ended:
        sys.exit(said[-4000:])
    return ended - began


def mball_batch(python: Path, model: Path, folder: Path) -> float:
    """Seconds."""
    source, target, config = folder / "mball-in.jsonl", folder / "mball.jsonl", folder / "mball.yaml"
    source.write_text(lines(model.name))
    entry = {
        "path": str(model),
        "engine": "vllm",
        "engine_python": str(python),
        "engine_args": {"enforce-eager": True, "enable-prefix-caching": False},
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": SEQUENCES,
        "kv_cache_memory_bytes": KV_BYTES,
    }
    config.write_text(yaml.safe_dump({"models": [entry], "log_dir": str(folder / "logs"), "start_timeout_s": 400}))
    with running_server(["--config", str(config)], log=folder / "log") as server:
        first = {"model": model.name, "prompt": "Hello", "max_tokens": 8}
        httpx.post(f"{server.url}/v1/completions", json=first, timeout=TIMEOUT_S).raise_for_status()
        command = [sys.executable, "-m", "mball", "batch", "-i", str(source), "-o", str(target), "--url", server.url]
        command += ["--json", "--concurrency", str(LINES)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
    return float(json.loads(done.stdout)["seconds"])


def answers(path: Path) -> dict[str, str]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in found}


def main(python: Path, model: Path, rounds: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        theirs_s = run_batch(python, model, folder)
        ours_s = mball_batch(python, model, folder)
        theirs, ours = answers(folder / "vllm.jsonl"), answers(folder / "mball.jsonl")
    if len(theirs) != LINES or theirs.keys() != ours.keys():
        sys.exit(f"{len(theirs)} and {len(ours)} answers of {LINES}")
    same = sum(theirs[name] == ours[name] for name in theirs)
    tokens = LINES * TOKENS
    figures = {"run_batch_s": theirs_s, "mball_batch_s": ours_s, "ratio": theirs_s / ours_s, "same_answers": same}
    figures |= {"run_batch_tokens_per_s": tokens / theirs_s, "mball_batch_tokens_per_s": tokens / ours_s}
    with rounds.open("a") as file:
        file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(*(Path(argument).absolute() for argument in sys.argv[1:]))
