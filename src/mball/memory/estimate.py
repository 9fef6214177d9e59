"""What a model will take of the device, from its files alone: for the time before its worker was ever started."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from mball.device.host import memory_bytes
from mball.errors import CheckpointError, UnsupportedCheckpoint
from mball.loader.checkpoint import COMPUTED, Checkpoint
from mball.memory import vllm_cold
from mball.memory.spec import WorkerSpec
from mball.memory.vllm_cold import Cold
from mball.memory.vllm_options import offloads
from mball.swap.layers_plan import Sizes, cells_for, expert_sizes_of, sizes_of
from mball.units import GiB, MiB

DEFAULT_TOKENS_PER_SEQ = 2048
"""Tokens of KV a sequence gets where neither `kv_cache_bytes` nor `max_model_len` is given."""

_CONTEXT_BYTES = 1 * GiB
"""What a GPU's context and libraries take at most, for the time before a worker of it was measured."""

_VLLM_BYTES = 2 * GiB
"""The same of vLLM's, with its graphs."""

_WORKING_BYTES = 64 * MiB
"""The least that is left beside weights and KV."""

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_VLLM_READS = (("*.safetensors",), ("*.bin",), ("*.pt", "*.pth"), ("*.gguf",))
"""In this order: of a folder with files of several kinds, one kind."""
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})


@dataclass(frozen=True, slots=True)
class Estimate:
    """Weights exactly, as the files' headers say, as far as they stay on the device; KV as the configuration does. Of a
    model on several GPUs the equal share of one of them. Of files that only vLLM reads, their sizes.

    `cold`: how vLLM is to have layers in host memory (None: it has none there), and `cold_bytes` what they take of it.
    """

    weights_bytes: int
    kv_bytes: int
    cold: Cold | None = None
    cold_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes


def estimate(spec: WorkerSpec) -> Estimate | None:
    """None where the files don't tell: then the worker will. Reads headers and config.json; blocks."""
    try:
        config = json.loads((Path(spec.path) / "config.json").read_bytes())
        checkpoint, text = _checkpoint(spec), config.get("text_config", config)
        dtype = spec.dtype or config.get("dtype") or config.get("torch_dtype") or _stored_as(checkpoint)
        item_bytes = _ITEM_BYTES[dtype]
        kv_bytes = 0 if spec.task == "embed" else _kv_bytes(spec, text, item_bytes)
        weights_bytes, cold, cold_bytes = _weights_bytes(spec, checkpoint, item_bytes), None, 0
        sizes = (
            None if checkpoint is None else streamed_sizes(spec, checkpoint, int(text["num_hidden_layers"]), item_bytes)
        )
        if sizes is not None and spec.engine == "vllm":
            if (cold := _cold(spec, sizes, kv_bytes)) is not None:
                weights_bytes, cold_bytes = cold.held_bytes(sizes), cold.host_bytes(sizes)
        elif sizes is not None:
            weights_bytes = sizes.held_bytes(cells(spec, sizes, kv_bytes))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, CheckpointError):
        return None
    return Estimate(weights_bytes // math.prod(_parallel(spec)), kv_bytes, cold, cold_bytes)


def _parallel(spec: WorkerSpec) -> tuple[int, int]:
    """All ranks of a CPU are in one memory."""
    return (1, 1) if spec.device == "cpu" else spec.parallel


def streamed(spec: WorkerSpec, most_bytes: int) -> WorkerSpec | None:
    """How a model that does not fit whole is served: experts of a mixture, or else layers, pass through the device.

    None for one that is served so already, that can't be, or that does not fit so either. Reads headers; blocks.
    """
    if spec.streamed or spec.task != "generate":
        return None
    if spec.engine == "vllm":
        return _colder(spec, most_bytes)
    for way in (replace(spec, resident_experts="auto"), replace(spec, resident_layers="auto")):
        found = estimate(replace(way, device_memory_bytes=most_bytes))
        if found is not None and found.total_bytes <= most_bytes:
            return way
    return None


def _colder(spec: WorkerSpec, most_bytes: int) -> WorkerSpec | None:
    """In numbers, as vLLM can't be told otherwise once it has started."""
    if spec.device == "cpu" or spec.ranks > 1 or offloads(spec.engine_args):
        return None
    found = estimate(replace(spec, resident_layers="auto", device_memory_bytes=most_bytes))
    if found is None or found.cold is None or found.weights_bytes + _beside(spec, found.kv_bytes) > most_bytes:
        return None
    if found.cold_bytes > memory_bytes():
        return None
    return replace(spec, resident_layers=found.cold.num_layers - found.cold.count)


def cold_most_bytes(spec: WorkerSpec) -> int | None:
    """What the weights of a model with cold layers hold of the device at the most, if half of what was to be spared of
    it is. None where none are cold. Reads headers; blocks."""
    found, whole = estimate(spec), estimate(replace(spec, resident_layers=None))
    if found is None or whole is None or found.cold is None:
        return None
    return max((whole.weights_bytes + found.weights_bytes) // 2, found.weights_bytes + _WORKING_BYTES)


def streamed_sizes(spec: WorkerSpec, checkpoint: Checkpoint, num_layers: int, item_bytes: int) -> Sizes | None:
    """Of what is streamed, layers or experts; None where nothing is. Raises ValueError for a model without experts."""
    if spec.resident_experts is not None:
        return expert_sizes_of(checkpoint, num_layers, item_bytes)
    return None if spec.resident_layers is None else sizes_of(checkpoint, num_layers, item_bytes)


def cells(spec: WorkerSpec, sizes: Sizes, beside_bytes: int) -> int:
    """How many layers' or experts' room a model that may be streamed takes (mball.swap.layers_plan); `beside_bytes`:
    what it takes beside its weights, as far as is known."""
    wish = spec.resident_layers if spec.resident_experts is None else spec.resident_experts
    if wish is None:
        return sizes.count
    context_bytes = _CONTEXT_BYTES if spec.device.startswith("cuda") else 0
    beside_bytes += context_bytes + _WORKING_BYTES
    return cells_for(wish, sizes, limit_bytes=spec.device_memory_bytes, beside_bytes=beside_bytes)


def _cold(spec: WorkerSpec, sizes: Sizes, kv_bytes: int) -> Cold | None:
    if isinstance(spec.resident_layers, int):
        return vllm_cold.staying(sizes.count, spec.resident_layers)
    if spec.device_memory_bytes is None:
        return None
    # An eighth of the weights for what is not known yet, as everywhere.
    return vllm_cold.fitting(sizes, (spec.device_memory_bytes - _beside(spec, kv_bytes)) * 8 // 9)


def _beside(spec: WorkerSpec, kv_bytes: int) -> int:
    return kv_bytes + _WORKING_BYTES + (_VLLM_BYTES if spec.device.startswith("cuda") else 0)


def kv_blocks(spec: WorkerSpec, longest: int | None, block_bytes: int) -> int:
    """Blocks in the KV pool, the null block included; `longest` is what the model's configuration says.

    `kv_cache_bytes` decides where it is given. Else every sequence gets `max_model_len` tokens, at most
    DEFAULT_TOKENS_PER_SEQ, and the pool at least one whole sequence of `max_model_len` where that is given.
    """
    if spec.kv_cache_bytes is not None:
        return spec.kv_cache_bytes // block_bytes
    tokens = min(spec.max_model_len or longest or DEFAULT_TOKENS_PER_SEQ, DEFAULT_TOKENS_PER_SEQ)
    each = -(-tokens // spec.block_size)
    one = -(-(spec.max_model_len or 0) // spec.block_size)
    return 1 + max(spec.max_num_seqs * each, one)


def revision(spec: WorkerSpec) -> str:
    """Names a model's content and how it is served: what was measured of another revision says nothing of this one.

    Files count by name, size and time of change, so that nothing large is read. Blocks.
    """
    options = {name: value for name, value in zip(spec.__slots__, astuple(spec), strict=True) if name in _MATTERS}
    if spec.resident_layers is not None:
        options["resident_layers"] = spec.resident_layers
    if spec.resident_experts is not None:
        options["resident_experts"] = spec.resident_experts
    if spec.takes_what_it_may:
        options["device_memory_bytes"] = spec.device_memory_bytes
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for file in sorted(_files(Path(spec.path))):
        try:
            found = file.stat()
        except OSError:
            continue
        digest.update(f"\0{file.name}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


_MATTERS = frozenset(
    {
        "model",
        "path",
        "device",
        "task",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "kv_cache_bytes",
        "engine",
        "engine_args",
        "environment_digest",
    }
)


def _files(folder: Path) -> Iterator[Path]:
    yield folder / "config.json"
    yield from folder.glob("*.safetensors.index.json")
    for patterns in _VLLM_READS:
        for pattern in patterns:
            yield from folder.glob(pattern)


def _checkpoint(spec: WorkerSpec) -> Checkpoint | None:
    """None where vLLM will read files that are not read here, and layers need not be told apart. Raises
    CheckpointError."""
    try:
        return Checkpoint.open(spec.path)
    except UnsupportedCheckpoint:
        if spec.engine != "vllm" or spec.streamed:
            raise
        return None


def _stored_as(checkpoint: Checkpoint | None) -> str:
    """The dtype of most of its bytes."""
    sizes = Counter[str]()
    for tensor in checkpoint.tensors.values() if checkpoint is not None else ():
        sizes[COMPUTED.get(tensor.dtype, "float32")] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _weights_bytes(spec: WorkerSpec, checkpoint: Checkpoint | None, item_bytes: int) -> int:
    """Raises ValueError where there are no weights; OSError."""
    if checkpoint is not None:
        return sum(tensor.bytes_as(item_bytes) for tensor in checkpoint.tensors.values())
    for patterns in _VLLM_READS:
        files = {file for pattern in patterns for file in Path(spec.path).glob(pattern)}
        if nbytes := sum(file.stat().st_size for file in files if file.name not in _NO_WEIGHTS):
            return nbytes
    raise ValueError("there are no weights")


def _kv_bytes(spec: WorkerSpec, text: Any, item_bytes: int) -> int:
    # Of one GPU: a head is divided no further, so those that have one together have a copy each.
    tensor, pipeline = _parallel(spec)
    layers = -(-int(text["num_hidden_layers"]) // pipeline)
    if spec.engine == "vllm" and text.get("kv_lora_rank"):
        # Multi-head latent attention: what all heads' keys and values are made from.
        numbers = int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
    else:
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        numbers = 2 * -(-kv_heads // tensor) * int(text.get("head_dim") or text["hidden_size"] // heads)
    block_bytes = spec.block_size * layers * numbers * _kv_item_bytes(spec, item_bytes)
    longest = text.get("max_position_embeddings")
    return kv_blocks(spec, None if longest is None else int(longest), block_bytes) * block_bytes


def _kv_item_bytes(spec: WorkerSpec, item_bytes: int) -> int:
    """vLLM may keep KV in another dtype than it computes with."""
    dtype = str(spec.engine_options.get("kv_cache_dtype", "auto"))
    return 1 if dtype.startswith("fp8") else _ITEM_BYTES.get(dtype, item_bytes)
