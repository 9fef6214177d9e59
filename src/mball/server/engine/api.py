"""What a worker's HTTP side and an engine agree on.

Text is the worker's business (chat templates, detokenisation, stop strings); an engine sees token ids alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mball.loader.source import ImageReader
from mball.server.engine.grammar import Grammar
from mball.swap.block_store import BlockStore

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled. The names are OpenAI's and vLLM's.

    `seed` is always set (the worker draws one where the client gave none), so that a sequence draws the same noise
    in any batch and after any swap. `temperature` 0 is greedy. `top_k` 0 means all. `logprobs` is the number of
    alternatives wanted beside the sampled token (0: the sampled token's alone; None: none at all).
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to continue. `prompt` holds at least one token id. Sequences share KV only where their `cache_salt`
    is the same (vLLM's name): one a tenant keeps tenants apart. A `probe` is nobody's request: it tells nothing of what
    requests take. A `grammar` is this sequence's own; no token breaks it."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    cache_salt: str | None = None
    probe: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """log p of one token after temperature-free softmax of the raw logits (OpenAI's meaning)."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Output:
    """One step of one sequence.

    `token_id` is None only in a last output that carries no token (abort, error). A stop token is delivered, with
    `finish_reason` "stop"; the worker leaves it out of the text. The first one says how many tokens of the prompt were
    not computed (`cached_tokens`).
    """

    token_id: int | None
    logprob: Logprob | None = None
    top_logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0


Emit = Callable[[Output], None]
"""Called from the engine's thread, in order; the last call has a finish_reason. It must not block."""


@dataclass(frozen=True, slots=True)
class Promoted:
    """What bringing weights and KV to the device took."""

    weights_bytes: int
    kv_bytes: int
    load_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Demoted:
    """What giving the device back took. `released_bytes` is what was unmapped."""

    released_bytes: int
    total_s: float


@dataclass(frozen=True, slots=True)
class Ballooned:
    """What the balloon holds now: device bytes that the engine does without. `kv_bytes` is what its KV pool has."""

    ballooned_bytes: int
    kv_bytes: int
    total_s: float


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Numbers of the moment. Bytes are device bytes. `spare_bytes` can be given to the balloon beside what is there
    already, and nobody would notice. `error` says what is wrong with the engine, if anything is. Of `num_layers`,
    `resident_layers` stay on the device and the others are streamed; of `num_experts`, which are those of all layers,
    `resident_experts` have room. All are 0 where nothing is streamed. `layer_bytes` more could be given of either,
    after which a request would take `layer_s` longer, as measured on average; both are 0 while that is not known.

    Of tokens that need not be computed, `prefix_hit_tokens` were in the KV pool and `kv_restored_tokens` came back to
    it. `host_bytes` of host memory are for KV, where that is other memory than the device's. `kv_stored_blocks` were
    written to the store. `kv_refusals`: computing was the faster way; `kv_failures`: blocks that were damaged or late,
    and computed instead."""

    resident: bool
    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    weights_bytes: int
    kv_bytes: int
    error: str | None = None
    ballooned_bytes: int = 0
    spare_bytes: int = 0
    num_layers: int = 0
    resident_layers: int = 0
    num_experts: int = 0
    resident_experts: int = 0
    layer_bytes: int = 0
    layer_s: float = 0.0
    prefix_hit_tokens: int = 0
    kv_restored_tokens: int = 0
    kv_stored_blocks: int = 0
    kv_refusals: int = 0
    kv_failures: int = 0
    host_bytes: int = 0


class Residency(Protocol):
    """The memory verbs that every engine has. All block; none but `fill_image` is called while another runs."""

    def promote(
        self,
        image_fd: int | None,
        progress: Callable[[int, int], None] | None = None,
        stored: ImageReader | None = None,
    ) -> Promoted:
        """Weights from the image where `image_fd` is given, else as `stored` reads it, else from the source shards; a
        fresh KV pool. A model that is streamed takes no `stored`.

        Raises DeviceOutOfMemory, CheckpointError, SwapMiss. After an error nothing is held on the device.
        """

    def demote(self) -> Demoted:
        """Give weights and KV back. The caller has drained the engine; what still runs ends with "abort"."""

    def balloon(self, nbytes: int, *, gently: bool = False) -> Ballooned:
        """Do without `nbytes` of device memory while serving, rounded up; less than before: take the rest back.

        First goes the KV that no sequence of the longest kind would miss, then layers, where they may be streamed,
        then the rest of the KV. It holds over demotions. Sequences that lose their room wait for it, and those that no
        longer fit end with an error; `gently`: refused where there would be such, or layers would go.
        Raises TransitionError, DeviceOutOfMemory; then nothing has changed.
        """

    def set_threads(self, threads: int) -> None:
        """Compute on so many threads from the next step on. Thread-safe, does not block."""

    def fill_image(self, image_fd: int, cancel: threading.Event | None = None) -> int:
        """Copy the source shards into the image (a memfd of `image_bytes`); returns the bytes written.

        Raises Cancelled once `cancel` is set; then the image holds rubbish.
        """

    def use_image(self, image_fd: int | None) -> None:
        """What is read while the engine serves comes from this image from now on, or from the source shards; of the
        image before nothing is read any more. Raises CheckpointError, TransitionError."""

    @property
    def image_bytes(self) -> int: ...

    def image_key(self) -> bytes | None:
        """Names the image of the source shards as they are now (see loader.image.key); None where the engine takes no
        `stored`, or they can't be read. Blocks."""

    def close(self) -> None:
        """End the engine's threads within a bounded time."""


class Generator(Residency, Protocol):
    """An engine that continues sequences."""

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def submit(self, request: GenerateRequest, emit: Emit) -> None:
        """Queue a sequence. Thread-safe, does not block. A sequence that can never fit ends with "error"."""

    def abort(self, request_id: str) -> None:
        """End a sequence and free its slot before the next step. Thread-safe; unknown ids are ignored."""

    def use_block_store(self, store: BlockStore | None) -> None:
        """Where KV blocks go to and come back from below host memory, from now on; None: nowhere. Of the one before
        nothing is used any more. Thread-safe, at any time. Without host memory for blocks it is not used.

        Raises TransitionError where what was begun with the one before does not end in time.
        """

    def status(self) -> EngineStatus: ...


class Embedder(Residency, Protocol):
    """An engine that maps token sequences to vectors."""

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector of `hidden_size` floats per prompt, pooled and normalised as the model's files say. Blocks."""

    def status(self) -> EngineStatus: ...
