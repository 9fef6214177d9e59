"""What the manager is told of a model, and what a worker is told when it starts (JSON on its command line)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["generate", "embed"]
Engine = Literal["transformers", "vllm"]

PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size")
"""vLLM's options by which a model is spread over several GPUs."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One model as its worker serves it.

    `device` is `cpu`, `cuda:GPU-uuid`, `simulated:PATH` (a simulated device whose state is at PATH), or several with
    `+` between them, of which each of its `ranks` has one; the manager
    sets it and `socket_path` when it starts the worker. `kv_cache_bytes` is the size of the KV pool; None lets the
    worker choose it from `max_num_seqs` and `max_model_len`. `resident_layers` stay on the device while the others are
    streamed through it: as many as fit (`auto`), a number, or None for all (a manager that sees that they can never fit
    says `auto` itself).
    `resident_experts` says so of a mixture's experts, counted over all layers; one of the two is given at most.
    `device_memory_bytes` is what `auto` may take in all (None: there is no limit). `busy_requests`: how many were
    inside at once lately (0: not known). `enable_prefix_caching`: KV of sequences that ended is kept for those that
    begin alike. `kv_arena_bytes` of host memory are for KV blocks that left the device (None: a modest part on a GPU,
    none on the CPU); a store of blocks is used through it. `engine_python` is the interpreter of an engine that has one
    of its own, `engine_args` are options by that engine's names. `environment_digest` is the SHA-256 of the environment
    that its operator gives it (empty: none): that may be secret, and a spec is seen by all users.
    """

    model: str
    path: str
    socket_path: str = ""
    device: str = "cpu"
    task: Task = "generate"
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512
    block_size: int = 16
    kv_cache_bytes: int | None = None
    max_logprobs: int = 20
    threads: int = 2
    trust_remote_code: bool = False
    resident_layers: int | Literal["auto"] | None = None
    resident_experts: int | Literal["auto"] | None = None
    device_memory_bytes: int | None = None
    busy_requests: int = 0
    enable_prefix_caching: bool = True
    kv_arena_bytes: int | None = None
    engine: Engine = "transformers"
    engine_python: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    environment_digest: str = ""

    @property
    def starts_awake(self) -> bool:
        """Its worker is on the device once it has started, and takes there what it needs as it starts."""
        return self.engine == "vllm"

    @property
    def engine_options(self) -> dict[str, Any]:
        """`engine_args` by one spelling of their names."""
        return {name.replace("-", "_"): value for name, value in self.engine_args.items()}

    @property
    def ranks(self) -> int:
        """Processes of its engine that compute, each on a GPU of its own where there are any."""
        return math.prod(self.parallel)

    @property
    def parallel(self) -> tuple[int, int]:
        """How many have a part of every layer each, and into how many stages the layers are divided."""
        tensor, pipeline = (int(self.engine_options.get(name) or 1) for name in PARALLEL)
        return tensor, pipeline

    @property
    def streamed(self) -> bool:
        """Whether a part of it may be away from the device while it serves."""
        return self.resident_layers is not None or self.resident_experts is not None

    @property
    def takes_what_it_may(self) -> bool:
        return "auto" in (self.resident_layers, self.resident_experts)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerSpec:
        """Raises ValueError where the text is not a spec."""
        data: Any = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("a worker spec is a JSON object")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"not a worker spec: {error}") from None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model as the manager serves it.

    `pinned`: once on the device it is never demoted for another. `priority`: the higher is served first, and leaves for
    a lower one only once that is overdue. `preload`: brought in at start where there is room.
    `keep_alive_s`: demoted after so long without a request (None: only to make room). `working_bytes`: device bytes
    beside weights and KV, until they are measured (None: a first guess from the weights). `max_in_flight`: requests
    handed to the worker at once (None: twice `max_num_seqs`); the rest wait here, so that a stay can be ended.
    `max_queue`: requests that may wait for it (None: as many as may wait in all).
    `devices`: the names of those that it may go to (none: any).
    `environment` is added to the worker's.
    """

    worker: WorkerSpec
    pinned: bool = False
    priority: int = 0
    preload: bool = False
    keep_alive_s: float | None = None
    working_bytes: int | None = None
    max_in_flight: int | None = None
    max_queue: int | None = None
    devices: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.worker.model

    @property
    def admitted(self) -> int:
        """Requests that may be under way in the worker."""
        return self.max_in_flight if self.max_in_flight is not None else 2 * self.worker.max_num_seqs
