"""The embedding engine: an encoder over padded batches of inputs of like length, pooled as the model's files say."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import torch

from mball.errors import InvalidRequest, TransitionError, Unavailable
from mball.loader.source import ImageReader
from mball.memory.spec import WorkerSpec
from mball.server.engine.api import Ballooned, Demoted, EngineStatus, Promoted
from mball.server.engine.pooling import Pooling
from mball.server.engine.resident import Progress, ResidentWeights

DEADLINE_S = 120.0
"""The longest that one call, or the end of the thread, is waited for."""

_Prompts = Sequence[Sequence[int]]
_Job = tuple[_Prompts, "Future[list[list[float]]]"]


class EmbedEngine:
    """An `Embedder` over one transformers model (mball.server.engine.api says what each method does).

    One thread computes, so that callers on many threads share one pool of compute threads.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        weights: ResidentWeights,
        pooling: Pooling,
        device: torch.device,
        *,
        max_model_len: int,
        vocab_size: int,
        hidden_size: int,
    ) -> None:
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self._spec = spec
        self._weights = weights
        self._pooling = pooling
        self._device = device
        self._resident = False
        self._threads = self._threads_set = spec.threads
        self._pending = 0
        self._counting = threading.Lock()
        self._error: str | None = None
        self._computing = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"engine-{spec.model}", daemon=True)
        self._thread.start()

    def embed(self, prompts: _Prompts) -> list[list[float]]:
        """Raises InvalidRequest for a prompt that is empty, too long or not of this vocabulary; Unavailable while the
        weights are away; TimeoutError."""
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.max_model_len:
                raise InvalidRequest(
                    f"input {index} has {len(prompt)} tokens; {self._spec.model} takes 1 to {self.max_model_len}",
                    code="context_length_exceeded",
                    param="input",
                )
            if min(prompt) < 0 or max(prompt) >= self.vocab_size:
                raise InvalidRequest(f"input {index} has token ids outside the vocabulary", param="input")
        answer: Future[list[list[float]]] = Future()
        with self._counting:
            self._pending += 1
        try:
            self._jobs.put((prompts, answer))
            return answer.result(DEADLINE_S)
        finally:
            with self._counting:
                self._pending -= 1

    def status(self) -> EngineStatus:
        return EngineStatus(
            resident=self._resident,
            running=min(self._pending, 1),
            waiting=max(self._pending - 1, 0),
            kv_blocks_total=0,
            kv_blocks_free=0,
            weights_bytes=self._weights.nbytes,
            kv_bytes=0,
            error=self._error,
        )

    @property
    def image_bytes(self) -> int:
        return self._weights.image_bytes

    def image_key(self) -> bytes | None:
        return self._weights.image_key()

    def use_image(self, image_fd: int | None) -> None:
        """All of it is on the device."""

    def fill_image(self, image_fd: int, cancel: threading.Event | None = None) -> int:
        return self._weights.fill_image(image_fd, cancel)

    def promote(
        self, image_fd: int | None, progress: Progress | None = None, stored: ImageReader | None = None
    ) -> Promoted:
        began = time.perf_counter()
        if self._resident:
            raise TransitionError(f"{self._spec.model} is on the device already")
        load_s = self._weights.load(image_fd, progress, stored)
        self._resident = True
        return Promoted(self._weights.nbytes, 0, load_s, time.perf_counter() - began)

    def demote(self) -> Demoted:
        began = time.perf_counter()
        self._resident = False
        # A batch under way ends first; the jobs behind it find the weights away.
        if not self._computing.acquire(timeout=DEADLINE_S):
            raise TransitionError(f"{self._spec.model}: its batch did not end within {DEADLINE_S:.0f} s")
        try:
            return Demoted(self._weights.release(), time.perf_counter() - began)
        finally:
            self._computing.release()

    def balloon(self, nbytes: int, *, gently: bool = False) -> Ballooned:
        if nbytes != 0:
            raise TransitionError(f"{self._spec.model}: an embedding model has no KV pool to give up")
        return Ballooned(0, 0, 0.0)

    def set_threads(self, threads: int) -> None:
        self._threads = threads

    def close(self) -> None:
        self._resident = False
        self._jobs.put(None)
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            raise TransitionError(f"{self._spec.model}: its batch did not end within {DEADLINE_S:.0f} s")
        self._weights.release()
        self._weights.close()

    def _run(self) -> None:
        torch.set_num_threads(self._spec.threads)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                prompts, answer = job
                try:
                    answer.set_result(self._compute(prompts))
                    self._error = None
                except Unavailable as error:
                    answer.set_exception(error)
                except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                    self._error = f"a batch failed: {type(error).__name__}: {error}"
                    answer.set_exception(TransitionError(f"{self._spec.model}: {self._error}"))

    def _compute(self, prompts: _Prompts) -> list[list[float]]:
        vectors: list[list[float]] = [[]] * len(prompts)
        for batch in self._batches(prompts):
            with self._computing:
                if not self._resident:
                    raise Unavailable(f"{self._spec.model} is not on its device")
                for index, vector in zip(batch, self._forward([prompts[index] for index in batch]), strict=True):
                    vectors[index] = vector
        return vectors

    def _batches(self, prompts: _Prompts) -> Iterator[list[int]]:
        """Indices of prompts, longest first, so that like lengths share a batch and little is padding."""
        batch: list[int] = []
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            width = len(prompts[batch[0]]) if batch else 0
            full = (len(batch) + 1) * width > self._spec.max_num_batched_tokens
            if batch and (full or len(batch) == self._spec.max_num_seqs):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _forward(self, prompts: _Prompts) -> list[list[float]]:
        if self._threads != self._threads_set:
            self._threads_set = self._threads
            torch.set_num_threads(self._threads_set)
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self._device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        mask = (torch.arange(width, device=self._device)[None] < lengths[:, None]).long()
        hidden = self._weights.module(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors: list[list[float]] = self._pooling.apply(hidden, mask).tolist()
        return vectors
