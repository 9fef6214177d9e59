"""What the tests of the engine share: running requests, and the reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mball.server.engine.api import GenerateRequest, Generator, Output, SamplingParams
from mball.server.engine.engine import GenerateEngine

WAIT_S = 120.0

ModelDir = Callable[[str], Path]
"""The folder of one of the tiny models, by its name in conftest.CONFIGS."""

Oracle = Callable[[Path], PreTrainedModel]
EngineFor = Callable[..., GenerateEngine]
"""Opens, and by default promotes, an engine: (path, **options of WorkerSpec)."""


class Run:
    """One submitted request and its outputs so far."""

    def __init__(
        self,
        engine: Generator,
        request_id: str,
        prompt: Sequence[int],
        *,
        cache_salt: str | None = None,
        probe: bool = False,
        **sampling: Any,
    ) -> None:
        self.outputs: list[Output] = []
        self.first = threading.Event()
        self.done = threading.Event()
        params = SamplingParams(**{"max_tokens": 12, "seed": 1, "temperature": 0.0, **sampling})
        engine.submit(GenerateRequest(request_id, prompt, params, cache_salt, probe), self._emit)

    def _emit(self, output: Output) -> None:
        self.outputs.append(output)
        self.first.set()
        if output.finish_reason is not None:
            self.done.set()

    def wait(self) -> Run:
        assert self.done.wait(WAIT_S), "the sequence did not end"
        return self

    @property
    def tokens(self) -> list[int]:
        return [output.token_id for output in self.outputs if output.token_id is not None]

    @property
    def reason(self) -> str | None:
        return self.outputs[-1].finish_reason

    @property
    def error(self) -> str | None:
        return self.outputs[-1].error


def run_all(engine: Generator, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Run]:
    """All at once; waits for the end of each. A list given for a parameter holds one value per prompt."""
    runs = []
    for index, prompt in enumerate(prompts):
        own = {key: value[index] if isinstance(value, list) else value for key, value in sampling.items()}
        runs.append(Run(engine, f"r{index}", prompt, **own))
    return [run.wait() for run in runs]


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens without any cache: the whole sequence is computed anew for each; and the log softmax rows."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        tokens.append(int(logits[-1].argmax()))
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return tokens[len(prompt) :], logits.float().log_softmax(-1)


def prompts(count: int, vocab_size: int = 199, longest: int = 40) -> list[list[int]]:
    """Prompts of mixed lengths, the same in every run."""
    generator = torch.Generator().manual_seed(count)
    lengths = [1 + (index * 13) % longest for index in range(count)]
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]
