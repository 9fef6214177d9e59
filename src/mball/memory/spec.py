"""What a worker is told when it starts: plain data, sent as JSON on its command line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["generate", "embed"]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One model as its worker serves it.

    `device` is `cpu`, `cuda:GPU-uuid`, or `simulated:PATH` (a simulated device whose state is at PATH).
    `kv_cache_bytes` is the size of the KV pool; None lets the worker choose it from `max_num_seqs` and
    `max_model_len`. `context_bytes` of the device are what an idle worker may hold.
    """

    model: str
    path: str
    socket_path: str
    device: str
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
