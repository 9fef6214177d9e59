"""vLLM on a GPU by MBALL's load format and sleep backend beside its own: run by an interpreter that has vLLM.

    python tests/gpu/vllm_check.py MODEL_FOLDER RESULTS.jsonl [STAGE …]

The stages run in turn, each in a process of its own; what one has found is written, a line of JSON each, before the
next begins. PYTHONPATH holds MBALL with its plugins (mball.server.engine_path.search_path) and what vLLM needs.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("versions", "stock", "mball", "changed", "reload")
PROMPT_IDS = [[(7 * i + j) % 200 + 5 for j in range(48)] for i in range(4)]
CYCLES = int(os.environ.get("MBALL_CHECK_CYCLES", "10"))
KV_BYTES = 2 << 30
SEQUENCES = 32

_out: Path


def tell(**found: Any) -> None:
    with _out.open("a") as file:
        file.write(json.dumps(found) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def timed(work: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return round(time.perf_counter() - began, 4)


def free_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def used_bytes() -> int:
    """Of the device by everybody, without a context of ours for the asking."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]) << 20


def resident_bytes() -> int:
    """Of this process, without what it shares."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


class Engine:
    """vLLM in this very process. `up_s`: from the call to an engine that answers, `load_s` of it the weights."""

    def __init__(self, model: str, load_format: str) -> None:
        from vllm import LLM
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        self.before_bytes = used_bytes()
        load_weights, self.load_s = DefaultModelLoader.load_weights, 0.0

        def load(*arguments: Any) -> None:
            self.load_s = timed(lambda: load_weights(*arguments))

        DefaultModelLoader.load_weights = load
        began = time.perf_counter()
        extension = {"worker_extension_cls": "mball.memory.vllm_cuda.CudaRpc"} if load_format == "mball" else {}
        self.llm = LLM(
            model=model,
            load_format=load_format,
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=SEQUENCES,
            kv_cache_memory_bytes=KV_BYTES,
            enable_sleep_mode=True,
            enforce_eager=os.environ.get("MBALL_CHECK_EAGER") == "1",
            enable_prefix_caching=False,
            seed=0,
            **extension,
        )
        DefaultModelLoader.load_weights = load_weights
        self.up_s = round(time.perf_counter() - began, 2)

    def rates(self, tokens: int = 256) -> dict[str, float]:
        """Tokens a second of one request, and of as many as run at once: the median of three each."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        found = {}
        for batch in (1, SEQUENCES):
            prompts = [{"prompt_token_ids": [*PROMPT_IDS[0][:-1], 300 + number]} for number in range(batch)]
            taken = [
                timed(lambda prompts=prompts: self.llm.generate(prompts, params, use_tqdm=False))  # type: ignore[misc]
                for _ in range(4)
            ]
            found[f"tokens_s_{batch}"] = round(batch * tokens / statistics.median(taken[1:]), 1)
        return found

    def answers(self, tokens: int = 16) -> list[Any]:
        """Greedy tokens and their logprobs, one sequence at a time: so nothing is batched differently."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=1)
        found = []
        for ids in PROMPT_IDS:
            done = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0].outputs[0]
            chosen = [step[token].logprob for step, token in zip(done.logprobs, done.token_ids, strict=True)]
            found.append([list(done.token_ids), chosen])
        return found

    def first_token(self) -> None:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        self.llm.generate([{"prompt_token_ids": PROMPT_IDS[0]}], params, use_tqdm=False)

    def rpc(self, method: str, *arguments: Any) -> Any:
        return self.llm.collective_rpc(method, args=arguments)[0]


def swapped(engine: Engine, cycles: int, before: list[Any]) -> dict[str, Any]:
    """Sleeps and wakes; seconds of each, and what was free."""
    awake_bytes, rows, resident = free_bytes(), [], []
    for _ in range(cycles):
        sleep_s = timed(lambda: engine.llm.sleep(level=1))
        asleep_bytes = free_bytes()
        wake_s = timed(lambda: engine.llm.wake_up())
        token_s = timed(engine.first_token)
        resident.append(resident_bytes())
        rows.append(
            {"sleep_s": sleep_s, "wake_s": wake_s, "first_token_s": token_s, "freed_bytes": asleep_bytes - awake_bytes}
        )
    engine.llm.sleep(level=1)
    held_bytes = used_bytes() - engine.before_bytes
    engine.llm.wake_up()
    after = engine.answers()
    return {
        "held_asleep_bytes": held_bytes,
        "cycles": rows[:3] + rows[-1:],
        "medians": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        # The first ones map what later ones have.
        "resident_drift": resident[-1] / resident[min(2, len(resident) - 1)] - 1,
        "same": after == before,
        "drift_bytes": awake_bytes - free_bytes(),
    }


def versions(model: str) -> None:
    import torch

    from mball.loader import vllm_compat

    found = vllm_compat.check_version()
    vllm_compat.loading()
    vllm_compat.sleeping()
    vllm_compat.cumem()
    vllm_compat.tiering()
    files = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    tell(stage="versions", vllm=found, torch=torch.__version__, gpu=torch.cuda.get_device_name(), weights_bytes=files)


def stock(model: str) -> None:
    engine = Engine(model, "auto")
    before = engine.answers()
    tell(stage="stock", part="up", up_s=engine.up_s, load_s=engine.load_s, rates=engine.rates())
    tell(stage="stock", part="swap", answers=before, **swapped(engine, 3, before))


def mball(model: str) -> None:
    from mball.device import memfd

    engine = Engine(model, "mball")
    described = engine.rpc("mball_describe")
    tell(stage="mball", part="up", up_s=engine.up_s, load_s=engine.load_s, described=described)
    # Right after it is ready: the image is filled while it answers, and then it is to sleep at once.
    fd = memfd.create("check", described["image_bytes"])
    began = time.perf_counter()
    engine.rpc("mball_fill_image", f"/proc/{os.getpid()}/fd/{fd}", [0])
    awake_bytes = free_bytes()
    engine.llm.sleep(level=1)
    fill_and_sleep_s = time.perf_counter() - began
    asleep_bytes = free_bytes()
    image = engine.rpc("mball_image")
    memfd.seal(fd)
    wake_s = timed(lambda: engine.llm.wake_up())
    before = engine.answers()
    tell(
        stage="mball",
        part="first sleep",
        image=image,
        fill_and_sleep_s=round(fill_and_sleep_s, 3),
        freed_bytes=asleep_bytes - awake_bytes,
        wake_s=wake_s,
        answers=before,
    )
    print_before = engine.rpc("mball_fingerprint")
    found = swapped(engine, CYCLES, before)
    tell(stage="mball", part="swap", fingerprint_same=engine.rpc("mball_fingerprint") == print_before, **found)
    tell(stage="mball", part="rates", rates=engine.rates())
    expected = [json.loads(line) for line in _out.read_text().splitlines()]
    peers = [line["answers"] for line in expected if line["stage"] == "stock" and "answers" in line]
    tell(stage="mball", part="as stock", same=bool(peers) and peers[-1] == before)


def changed(model: str) -> None:
    """A weight is changed after the image was filled: the change has to live through a sleep."""
    from mball.device import memfd

    engine = Engine(model, "mball")
    described = engine.rpc("mball_describe")
    fd = memfd.create("check", described["image_bytes"])
    engine.rpc("mball_fill_image", f"/proc/{os.getpid()}/fd/{fd}", [0])
    while engine.rpc("mball_image")["state"] == "filling":
        time.sleep(0.05)
    tell(stage="changed", part="image", **engine.rpc("mball_image"))
    before = engine.answers()

    def change(module: Any) -> None:
        import torch

        parameter = max(module.parameters(), key=lambda each: each.numel())
        with torch.no_grad():
            parameter.mul_(-1)

    engine.llm.apply_model(change)
    after_change = engine.answers()
    found = swapped(engine, 2, after_change)
    tell(stage="changed", part="swap", differs=after_change != before, **found)
    engine.llm.apply_model(change)
    tell(stage="changed", part="changed back", same=engine.answers() == before)
    engine.rpc("mball_drop_image")
    tell(stage="changed", part="without an image", **swapped(engine, 2, before))


def reload(model: str) -> None:
    """Without an image: the weights are forgotten, and read again."""
    engine = Engine(model, "mball")
    before, awake_bytes = engine.answers(), free_bytes()
    for _ in range(2):
        sleep_s = timed(lambda: engine.llm.sleep(level=2))
        freed = free_bytes() - awake_bytes
        began = time.perf_counter()
        engine.llm.wake_up(tags=["weights"])
        engine.llm.collective_rpc("reload_weights")
        engine.llm.wake_up(tags=["kv_cache"])
        wake_s = time.perf_counter() - began
        same = engine.answers() == before
        tell(stage="reload", sleep_s=sleep_s, wake_s=round(wake_s, 3), freed_bytes=freed, same=same)
    gc.collect()


def main() -> int:
    global _out
    model, _out, stages = sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or list(STAGES)
    if len(stages) == 1:
        {"versions": versions, "stock": stock, "mball": mball, "changed": changed, "reload": reload}[stages[0]](model)
        return 0
    failed = 0
    for stage in stages:
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "MBALL_VLLM_SLEEP": "0" if stage == "stock" else "1",
        }
        log = _out.with_suffix(f".{stage}.log")
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, __file__, model, str(_out), stage],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=400,
                check=False,
            )
        tell(stage=stage, part="ended", code=done.returncode, tail=log.read_text()[-1500:] if done.returncode else "")
        failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
