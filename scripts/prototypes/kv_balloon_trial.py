"""Tries kv_balloon.py on a GPU with vLLM 0.26 in this very process, by CUDA graphs.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 python scripts/prototypes/kv_balloon_trial.py MODEL_FOLDER RESULTS.jsonl [KV_GIB]

Each stage writes a line of JSON. PYTHONPATH holds vLLM and MBALL's `src`; cuda-bindings are needed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kv_balloon import Balloon, Memory

from mball.device.nvml import NvmlDevice
from mball.units import GiB

MAX_MODEL_LEN = 4160
TOKENS, SHRINK, GROW = 256, 60, 160
"""Answers of so many tokens; before which step memory goes, and before which it comes back."""

Between = Callable[[int], None]


@dataclass
class Run:
    """Greedy answers with their logprobs, and how long each step took."""

    answers: list[tuple[list[int], list[float]]]
    cached: list[int]
    step_s: list[float]
    seconds: float

    def told(self) -> dict[str, Any]:
        steps = sorted(self.step_s)
        tokens = sum(len(ids) for ids, _ in self.answers)
        places = {"median": len(steps) // 2, "p99": int(0.99 * (len(steps) - 1)), "max": -1}
        step_ms = {name: ms(steps[place]) for name, place in places.items()}
        return {"tokens_per_s": round(tokens / self.seconds, 1), "step_ms": step_ms}


class Engine:
    """vLLM, step by step."""

    def __init__(self, model: str, kv_bytes: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=64,
            kv_cache_memory_bytes=kv_bytes,
            enable_sleep_mode=True,
            enable_prefix_caching=True,
            compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
            seed=0,
        )
        self._engine: Any = self.llm.llm_engine
        core = self._engine.engine_core.engine_core
        self.pool = core.scheduler.kv_cache_manager.block_pool
        self.block_tokens = int(core.vllm_config.cache_config.block_size)
        self.tensors = list(core.model_executor.driver_worker.worker.model_runner.kv_caches)
        self._asked = 0

    def run(self, prompts: list[list[int]], tokens: int, between: Between = lambda step: None) -> Run:
        """`between(step)` comes before each step; its time is the step's."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=1)
        names = [str(self._asked + number) for number in range(len(prompts))]
        self._asked += len(prompts)
        for name, ids in zip(names, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": ids}, params)
        ended: dict[str, Any] = {}
        step_s: list[float] = []
        began = time.perf_counter()
        while self._engine.has_unfinished_requests():
            at = time.perf_counter()
            between(len(step_s))
            ended.update({output.request_id: output for output in self._engine.step() if output.finished})
            step_s.append(time.perf_counter() - at)
        outputs = [ended[name] for name in names]
        cached = [output.num_cached_tokens or 0 for output in outputs]
        return Run([_answer(each.outputs[0]) for each in outputs], cached, step_s, time.perf_counter() - began)


def _answer(output: Any) -> tuple[list[int], list[float]]:
    ids = list(output.token_ids)
    return ids, [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]


def made(count: int, length: int) -> list[list[int]]:
    """Prompts of which no two begin alike."""
    return [[(7 * number + place * (number + 1)) % 20000 + 5 for place in range(length)] for number in range(count)]


class Trial:
    """The stages, in turn, on one engine."""

    def __init__(self, model: str, results: Path, kv_bytes: int) -> None:
        self._results = results
        self._device = NvmlDevice.visible()[0]
        began = time.perf_counter()
        self.engine = Engine(model, kv_bytes)
        pool = self.engine.pool
        self.memory = Memory(self.engine.tensors, pool.num_gpu_blocks)
        self.balloon = Balloon(self.memory, pool, -(-MAX_MODEL_LEN // self.engine.block_tokens))
        self.tell(
            "up",
            seconds=round(time.perf_counter() - began, 1),
            layer_shape=[*self.engine.tensors[0].shape],
            layers=len(self.memory.layers),
            blocks=pool.num_gpu_blocks,
            rows=self.memory.rows,
            granule_bytes=self.memory.granule_bytes,
        )
        self.serve()
        whole = [self.serve() for _ in range(3)]
        divide_s = timed(self.memory.divide)
        parts = [self.serve() for _ in range(3)]
        self._expected = parts[0].answers
        self.tell(
            "plain",
            whole=[run.told() for run in whole],
            granules=[run.told() for run in parts],
            divide_s=divide_s,
            same=all(run.answers == self._expected for run in [*whole, *parts]),
        )

    def tell(self, stage: str, **found: Any) -> None:
        line = json.dumps({"stage": stage, **found})
        with self._results.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)  # noqa: T201

    def serve(self, between: Between = lambda step: None, count: int = 32, length: int = 64) -> Run:
        self.engine.llm.reset_prefix_cache()
        self.balloon.tidy()
        return self.engine.run(made(count, length), TOKENS, between)

    def share(self, percent: int) -> None:
        """Given back in one go while requests run, and again later."""
        rows: list[int] = []
        found: dict[str, Any] = {}

        def between(step: int) -> None:
            began, free_bytes = time.perf_counter(), self._device.free_bytes()
            if step == SHRINK:
                rows.extend(self.balloon.least_used(round(self.memory.rows * percent / 100)))
                found["in_use"] = self.balloon.withhold(rows)
                found["withhold_ms"] = ms(time.perf_counter() - began)
                self.memory.unmap(rows)
                found["shrink_ms"] = ms(time.perf_counter() - began)
                found["freed_gib"] = round((self._device.free_bytes() - free_bytes) / GiB, 3)
            if step == GROW:
                self.memory.map(rows)
                self.balloon.give_back()
                found["grow_ms"] = ms(time.perf_counter() - began)
                found["taken_gib"] = round((free_bytes - self._device.free_bytes()) / GiB, 3)

        run = self.serve(between)
        steps = {at: ms(run.step_s[at]) for at in (SHRINK - 1, SHRINK, SHRINK + 1, GROW, GROW + 1)}
        self.tell("share", percent=percent, **found, steps_ms=steps, same=run.answers == self._expected, **run.told())

    def gradual(self) -> None:
        """A row a step: how long one step is kept waiting."""
        rows: list[int] = []

        def between(step: int) -> None:
            if step == SHRINK:
                rows.extend(self.balloon.least_used(self.memory.rows // 2))
                self.balloon.withhold(rows)
            if SHRINK < step <= SHRINK + len(rows):
                self.memory.unmap([rows[step - SHRINK - 1]])
            if GROW < step <= GROW + len(rows):
                self.memory.map([rows[step - GROW - 1]])
            if step == GROW + len(rows) + 1:
                self.balloon.give_back()

        run = self.serve(between)
        found = {
            name: [ms(seconds) for seconds in run.step_s[at + 1 : at + 1 + len(rows)]]
            for name, at in (("shrinking_ms", SHRINK), ("growing_ms", GROW))
        }
        self.tell("gradual", **found, same=run.answers == self._expected, **run.told())

    def beside(self) -> None:
        """By another thread, while steps go on."""
        found: dict[str, Any] = {}
        work: list[Future[float]] = []

        def between(step: int) -> None:
            if step == SHRINK:
                self.balloon.withhold(self.balloon.least_used(self.memory.rows // 2))
                work.append(thread.submit(timed, lambda: self.memory.unmap(self.balloon.taken)))
            if step == GROW:
                found["shrink_s"] = work.pop().result(60)
                work.append(thread.submit(timed, lambda: self.memory.map(self.balloon.taken)))
            if step > GROW and work and work[0].done():
                found["grow_s"] = work.pop().result(0)
                self.balloon.give_back()

        with ThreadPoolExecutor(1) as thread:
            run = self.serve(between)
        worst = {
            name: [ms(seconds) for seconds in sorted(run.step_s[at : at + 80])[-3:]]
            for name, at in (("worst_shrinking_ms", SHRINK), ("worst_growing_ms", GROW))
        }
        self.tell("beside", **found, **worst, same=run.answers == self._expected, **run.told())

    def waits(self) -> None:
        """The row that running requests use most: it comes free as they end, and none that comes later gets there."""
        self._long = self.serve(count=96, length=700)
        found: dict[str, Any] = {}

        def between(step: int) -> None:
            if step == SHRINK:
                row = max(range(1, self.memory.rows), key=self.balloon.used)
                found["in_use"] = self.balloon.withhold([row])
            elif self.balloon.taken and "after_steps" not in found and not self.balloon.settle():
                found["after_steps"] = step - SHRINK
                self.memory.unmap(self.balloon.taken)

        run = self.serve(between, count=96, length=700)
        self.memory.map(self.balloon.taken)
        self.balloon.give_back()
        self.tell("waits", **found, steps=len(run.step_s), same=run.answers == self._long.answers)

    def evicted(self) -> None:
        """The cache is full of prefixes: what stays is right, what went is computed again."""
        self.engine.llm.reset_prefix_cache()
        self.balloon.tidy()
        length = MAX_MODEL_LEN - self.engine.block_tokens
        several = made((self.engine.pool.num_gpu_blocks - 1) * self.engine.block_tokens // (length + 16), length)
        cold, warm = self._each(several), self._each(several)
        rows = self.balloon.least_used(self.memory.rows * 3 // 4)
        found = {"in_use": self.balloon.withhold(rows), "evicted_blocks": self.balloon.evicted}
        self.memory.unmap(rows)
        small = self._each(several)
        self.memory.map(rows)
        self.balloon.give_back()
        again = self._each(several)
        # A prompt of which a part is cached is computed in other pieces, with other rounding.
        known = {place: (cold[place].answers, warm[place].answers) for place in range(len(several))}
        later = [(place, run) for runs in (small, again) for place, run in enumerate(runs)]
        compared = [run.answers in known[place] for place, run in later if run.cached[0] in (0, warm[0].cached[0])]
        cached = {"warm": warm, "small": small, "again": again}
        self.tell(
            "evicted",
            prompts=len(several),
            **found,
            cached_tokens={name: sum(run.cached[0] for run in runs) for name, runs in cached.items()},
            compared=len(compared),
            same=all(compared),
        )

    def _each(self, prompts: list[list[int]]) -> list[Run]:
        return [self.engine.run([ids], 4) for ids in prompts]

    def pressed(self) -> None:
        """Requests for more than what is left: they queue or are preempted, and all end."""
        self.engine.llm.reset_prefix_cache()
        self.balloon.tidy()
        rows = self.balloon.least_used(self.memory.rows * 3 // 4)
        self.balloon.withhold(rows)
        self.memory.unmap(rows)
        neighbour = torch.full((len(rows) * self.memory.row_bytes * 9 // 10,), 85, dtype=torch.uint8, device="cuda")
        run = self.engine.run(made(96, 700), TOKENS)
        intact = int(neighbour.min()) == int(neighbour.max()) == 85
        del neighbour
        torch.cuda.empty_cache()
        self.memory.map(rows)
        self.balloon.give_back()
        answers = zip(run.answers, self._long.answers, strict=True)
        self.tell(
            "pressed",
            ended=sum(len(ids) == TOKENS for ids, _ in run.answers),
            same_tokens=sum(ids == expected for (ids, _), (expected, _) in answers),
            neighbour_intact=intact,
            whole=self._long.told(),
            quarter=run.told(),
        )

    def slept(self) -> None:
        """Once the allocator's own mapping is back, vLLM's sleep is what it was."""
        self.engine.llm.reset_prefix_cache()
        found = {
            "unite_s": timed(self.memory.unite),
            "sleep_s": timed(lambda: self.engine.llm.sleep(level=1)),
            "wake_s": timed(self.engine.llm.wake_up),
        }
        self.tell("slept", **found, same=self.serve().answers == self._expected)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return round(time.perf_counter() - began, 4)


def ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)


def main() -> None:
    trial = Trial(sys.argv[1], Path(sys.argv[2]), int(float(sys.argv[3] if len(sys.argv) > 3 else 8) * GiB))
    for percent in (25, 50, 75):
        trial.share(percent)
    for stage in (trial.gradual, trial.beside, trial.waits, trial.evicted, trial.pressed, trial.slept):
        stage()


if __name__ == "__main__":
    main()
