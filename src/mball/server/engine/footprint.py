"""How much device memory a model will take: from its configuration and the headers of its files, nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mball.errors import UnsupportedCheckpoint
from mball.loader.checkpoint import Checkpoint
from mball.memory import estimate
from mball.memory.spec import WorkerSpec
from mball.server.engine import transformers_adapter as adapter
from mball.server.engine.kv_cache import KVGeometry
from mball.swap.layers_plan import LEAST_SLOTS, Sizes
from mball.swap.layers_read import PART_BYTES

LAYER_THREADS = 4
"""Threads that read layers which have no image, on the CPU: enough for a disk's queue."""

GPU_LAYER_THREADS = 8
"""Beside a GPU: they copy what they have read, and the disk is not to wait for that."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """`activation_bytes` is an estimate of the largest step's temporaries; the others are what will be taken, of the
    weights what is resident and the slots that the rest passes through; `layer_bytes` of that can be given up."""

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    layer_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.activation_bytes


def footprint(spec: WorkerSpec) -> Footprint:
    """Raises CheckpointError."""
    checkpoint = Checkpoint.open(spec.path)
    config = adapter.read_config(spec)
    dtype = adapter.choose_dtype(spec, config, checkpoint)
    text = adapter.text_config(config)
    weights_bytes = sum(tensor.bytes_as(dtype.itemsize) for tensor in checkpoint.tensors.values())
    if spec.task == "embed":
        tokens = spec.max_num_batched_tokens
        return Footprint(weights_bytes, 0, tokens * _token_activations(text) * 4)
    geometry = adapter.kv_geometry(spec, config, dtype)
    blocks = kv_blocks(spec, text, geometry)
    tokens = max(spec.max_num_batched_tokens, spec.max_num_seqs)
    # The sampler holds logits, a float copy, noise and a few more floats for each row that draws.
    sampling = spec.max_num_seqs * text.vocab_size * (dtype.itemsize + 5 * 4)
    gathered = spec.max_num_seqs * max_model_len(spec, text, blocks) * geometry.token_bytes // geometry.num_layers
    pool = blocks * geometry.block_bytes(spec.block_size)
    activations = tokens * _token_activations(text) * dtype.itemsize + sampling + min(gathered, pool)
    layer_bytes = 0
    if (sizes := _streamed(spec, checkpoint, geometry)) is not None:
        weights_bytes = sizes.held_bytes(estimate.cells(spec, sizes, pool))
        layer_bytes = weights_bytes - sizes.held_bytes(min(LEAST_SLOTS, sizes.count))
        # On the CPU what threads read through is the device's too.
        activations += LAYER_THREADS * PART_BYTES if spec.device == "cpu" else 0
    return Footprint(weights_bytes, pool, activations, layer_bytes)


def streamed_cells(spec: WorkerSpec, checkpoint: Checkpoint, geometry: KVGeometry, num_blocks: int) -> int | None:
    """How many layers' or experts' room a model that may be streamed takes; None for one that is whole.

    Raises UnsupportedCheckpoint.
    """
    sizes = _streamed(spec, checkpoint, geometry)
    return None if sizes is None else estimate.cells(spec, sizes, num_blocks * geometry.block_bytes(spec.block_size))


def _streamed(spec: WorkerSpec, checkpoint: Checkpoint, geometry: KVGeometry) -> Sizes | None:
    try:
        return estimate.streamed_sizes(spec, checkpoint, geometry.num_layers, geometry.dtype.itemsize)
    except ValueError as error:
        raise UnsupportedCheckpoint(f"{error}: leave resident_experts out", file=spec.path) from None


def _token_activations(text: Any) -> int:
    """Numbers held for one token inside a layer: residual, norm, queries, keys, values and the MLP's three."""
    return 8 * int(text.hidden_size) + 3 * int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)


def kv_blocks(spec: WorkerSpec, text: Any, geometry: KVGeometry) -> int:
    """Blocks in the pool, the null block included."""
    longest = getattr(text, "max_position_embeddings", None)
    return estimate.kv_blocks(spec, None if longest is None else int(longest), geometry.block_bytes(spec.block_size))


def max_model_len(spec: WorkerSpec, text: Any, num_blocks: int) -> int:
    """The longest sequence: what is asked for, else what the model knows; never more than the pool holds."""
    limits = [spec.max_model_len, getattr(text, "max_position_embeddings", None), (num_blocks - 1) * spec.block_size]
    return min(limit for limit in limits if limit)
