"""A small real engine without a model: a thread that continues each prompt with a script of token ids."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mball.loader.source import ImageReader
from mball.server.engine.api import (
    Ballooned,
    Demoted,
    Emit,
    EngineStatus,
    FinishReason,
    GenerateRequest,
    Logprob,
    Output,
    Promoted,
)
from mball.swap.block_store import BlockStore

Script = Callable[[GenerateRequest], Sequence[int]]


@dataclass
class _Sequence:
    request: GenerateRequest
    emit: Emit
    tokens: list[int]
    done: int = 0


class EchoEngine:
    """Gives the prompt back by default, then the end token, one token a step for each sequence. Half of each prompt, it
    says, was cached.

    A step waits for `step_s`. `submitted` holds every request, `live` those that still run. `break_with` makes the
    next step of every sequence end with that error.
    """

    max_model_len = 2048
    image_bytes = 4096

    def __init__(self, *, vocab_size: int, eos: int, script: Script | None = None, step_s: float = 0.0) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset({eos})
        self.submitted: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.break_with: str | None = None
        self.step_s = step_s
        self.script = script
        self.ballooned = (0, False)
        self.threads = 0
        self._eos = eos
        self._resident = False
        self._closing = False
        self._changed = threading.Condition()
        self._live: dict[str, _Sequence] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        with self._changed:
            return len(self._live)

    def wait_until_idle(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def submit(self, request: GenerateRequest, emit: Emit) -> None:
        with self._changed:
            self.submitted.append(request)
            if self._resident:
                tokens = list(self.script(request) if self.script is not None else request.prompt)
                self._live[request.request_id] = _Sequence(request, emit, [*tokens, self._eos])
                self._changed.notify_all()
                return
        emit(Output(None, finish_reason="error", error="not on its device"))

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborted.append(request_id)
            gone = self._live.pop(request_id, None)
            self._changed.notify_all()
        if gone is not None:
            gone.emit(Output(None, finish_reason="abort"))

    def image_key(self) -> bytes | None:
        return None

    def status(self) -> EngineStatus:
        with self._changed:
            return EngineStatus(self._resident, len(self._live), 0, 10, 10, 1000, 500)

    def promote(
        self,
        image_fd: int | None,
        progress: Callable[[int, int], None] | None = None,
        stored: ImageReader | None = None,
    ) -> Promoted:
        if progress is not None:
            progress(1000, 1000)
        self._resident = True
        return Promoted(1000, 500, 0.0, 0.0)

    def demote(self) -> Demoted:
        self._resident = False
        for request_id in list(self._live):
            self.abort(request_id)
        return Demoted(1500, 0.0)

    def balloon(self, nbytes: int, *, gently: bool = False) -> Ballooned:
        self.ballooned = (nbytes, gently)
        return Ballooned(nbytes, 500 - nbytes, 0.0)

    def set_threads(self, threads: int) -> None:
        self.threads = threads

    def use_image(self, image_fd: int | None) -> None:
        pass

    def use_block_store(self, store: BlockStore | None) -> None:
        pass

    def fill_image(self, image_fd: int, cancel: threading.Event | None = None) -> int:
        return self.image_bytes

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._live)
                if self._closing:
                    return
                self._changed.wait_for(lambda: self._closing, self.step_s)
                outputs = [(sequence, self._step(sequence)) for sequence in self._live.values()]
                for sequence, output in outputs:
                    if output.finish_reason is not None:
                        del self._live[sequence.request.request_id]
                self._changed.notify_all()
            for sequence, output in outputs:
                sequence.emit(output)

    def _step(self, sequence: _Sequence) -> Output:
        if self.break_with is not None:
            return Output(None, finish_reason="error", error=self.break_with)
        sampling = sequence.request.sampling
        token = sequence.tokens[min(sequence.done, len(sequence.tokens) - 1)]
        sequence.done += 1
        reason: FinishReason | None = None
        if token in sampling.stop_token_ids:
            reason = "stop"
        elif sequence.done >= sampling.max_tokens:
            reason = "length"
        if sampling.logprobs is None:
            cached = len(sequence.request.prompt) // 2 if sequence.done == 1 else 0
            return Output(token, finish_reason=reason, cached_tokens=cached)
        tops = tuple(Logprob((token + i) % self.vocab_size, -0.5 - i) for i in range(sampling.logprobs))
        return Output(token, Logprob(token, -0.5), tops, finish_reason=reason)


class EchoEmbedder:
    """Gives [number of tokens, first token, last token, 0.5] for each prompt."""

    max_model_len = 64
    hidden_size = 4
    image_bytes = 0

    def __init__(self, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.calls: list[int] = []
        self._resident = False

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        self.calls.append(len(prompts))
        return [[float(len(prompt)), float(prompt[0]), float(prompt[-1]), 0.5] for prompt in prompts]

    def image_key(self) -> bytes | None:
        return None

    def status(self) -> EngineStatus:
        return EngineStatus(self._resident, 0, 0, 0, 0, 1000, 0)

    def promote(
        self,
        image_fd: int | None,
        progress: Callable[[int, int], None] | None = None,
        stored: ImageReader | None = None,
    ) -> Promoted:
        self._resident = True
        return Promoted(1000, 0, 0.0, 0.0)

    def demote(self) -> Demoted:
        self._resident = False
        return Demoted(1000, 0.0)

    def balloon(self, nbytes: int, *, gently: bool = False) -> Ballooned:
        self.ballooned = (nbytes, gently)
        return Ballooned(nbytes, 500 - nbytes, 0.0)

    def set_threads(self, threads: int) -> None:
        self.threads = threads

    def use_image(self, image_fd: int | None) -> None:
        pass

    def fill_image(self, image_fd: int, cancel: threading.Event | None = None) -> int:
        return 0

    def close(self) -> None:
        self._resident = False
