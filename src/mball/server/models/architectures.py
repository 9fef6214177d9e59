"""Shapes of real architectures, chosen so that a model has the size that is asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mball.errors import ConfigError
from mball.loader.header import BITS
from mball.server.models.shards import TensorSpec
from mball.units import format_bytes

Architecture = Literal["llama", "qwen3", "qwen3-moe", "mixtral"]
Dtype = Literal["bfloat16", "float16", "float32"]
SAFETENSORS: dict[Dtype, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

_WIDTHS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 12288)
_VOCABULARIES = (320, 4096, 32000, 128256)
_EMBEDDING_SHARE = 0.2
_TOLERANCE = 0.01
_MAX_MODEL_LEN = 8192


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that a model's tensors follow from. `num_experts` is 0 in a dense model."""

    architecture: Architecture
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int


def fit(architecture: Architecture, size_bytes: int, dtype: Dtype, vocab_size: int | None = None) -> Shape:
    """The shape of about `size_bytes` (within 2 %) that is likest to a model of that family.

    `vocab_size` is chosen where None is given. Raises ConfigError where no shape is near the size.
    """
    itemsize = BITS[SAFETENSORS[dtype]] // 8
    best: tuple[float, Shape] | None = None
    for width in _WIDTHS:
        vocab = vocab_size or _vocabulary(width, size_bytes // itemsize)
        for shape in _of_width(architecture, width, vocab, size_bytes // itemsize):
            error = abs(parameters(shape) * itemsize / size_bytes - 1)
            oddness = abs(math.log(shape.num_hidden_layers / _usual_layers(width)))
            if error <= _TOLERANCE and (best is None or oddness < best[0]):
                best = (oddness, shape)
    if best is None:
        raise ConfigError(f"{architecture}: no shape is within 2 % of {format_bytes(size_bytes)}; ask for another size")
    return best[1]


def _usual_layers(width: int) -> int:
    """Two layers at 64, 16 at 2048, 32 at 4096, 80 at 8192: as in the families' published models."""
    return max(2, round(width / 128)) if width < 5120 else round(width / 102)


def _vocabulary(width: int, count: int) -> int:
    fitting = [vocab for vocab in _VOCABULARIES if 2 * vocab * width <= _EMBEDDING_SHARE * count]
    return fitting[-1] if fitting else _VOCABULARIES[0]


def _of_width(architecture: Architecture, width: int, vocab: int, count: int) -> Iterator[Shape]:
    """Shapes of that width with about `count` parameters: the feed-forward width takes up what layers leave over."""
    head_dim = 128 if width >= 1024 else 64 if width >= 256 else 16
    heads = width // head_dim
    groups = next(groups for groups in (8, 4, 2, 1) if heads % groups == 0)
    experts = _FAMILIES[architecture].experts(width)
    ratio = _FAMILIES[architecture].feed_forward

    def shape(layers: int, feed_forward: int) -> Shape:
        return Shape(architecture, width, layers, feed_forward, heads, groups, head_dim, vocab, experts)

    per_layer = parameters(shape(1, round(ratio * width))) - parameters(shape(0, 0))
    usual = round((count - parameters(shape(0, 0))) / per_layer)
    for layers in (usual - 1, usual, usual + 1):
        if layers < 1:
            continue
        bare = parameters(shape(layers, 0))
        per_unit = parameters(shape(layers, 1)) - bare
        for step in (64, 16, 4):  # kernels like the largest; the smallest model needs the smallest
            feed_forward = step * round((count - bare) / per_unit / step)
            if 0.5 * ratio * width <= feed_forward <= 2 * ratio * width:
                yield shape(layers, feed_forward)


def parameters(shape: Shape) -> int:
    """Counted on one layer: a large model of many experts has some hundred thousand tensors."""
    none, one = (
        sum(tensor.nbytes for tensor in tensors(dataclasses.replace(shape, num_hidden_layers=layers), "U8"))
        for layers in (0, 1)
    )
    return none + shape.num_hidden_layers * (one - none)


def tensors(shape: Shape, dtype: str) -> Iterator[TensorSpec]:
    """The checkpoint's tensors under the names they have on the hub, in the order of the layers."""

    def spec(name: str, *dimensions: int) -> TensorSpec:
        return TensorSpec(name, dtype, dimensions)

    hidden, head_dim, family = shape.hidden_size, shape.head_dim, _FAMILIES[shape.architecture]
    queries, keys = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    yield spec("model.embed_tokens.weight", shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield spec(f"{prefix}.input_layernorm.weight", hidden)
        yield spec(f"{prefix}.self_attn.q_proj.weight", queries, hidden)
        yield spec(f"{prefix}.self_attn.k_proj.weight", keys, hidden)
        yield spec(f"{prefix}.self_attn.v_proj.weight", keys, hidden)
        yield spec(f"{prefix}.self_attn.o_proj.weight", hidden, queries)
        if family.head_norms:
            yield spec(f"{prefix}.self_attn.q_norm.weight", head_dim)
            yield spec(f"{prefix}.self_attn.k_norm.weight", head_dim)
        yield spec(f"{prefix}.post_attention_layernorm.weight", hidden)
        block = f"{prefix}.{family.block}"
        if shape.num_experts:
            yield spec(f"{block}.gate.weight", shape.num_experts, hidden)
        gate, up, down = family.projections
        for expert in range(shape.num_experts) if shape.num_experts else (None,):
            part = block if expert is None else f"{block}.experts.{expert}"
            yield spec(f"{part}.{gate}.weight", shape.intermediate_size, hidden)
            yield spec(f"{part}.{up}.weight", shape.intermediate_size, hidden)
            yield spec(f"{part}.{down}.weight", hidden, shape.intermediate_size)
    yield spec("model.norm.weight", hidden)
    yield spec("lm_head.weight", shape.vocab_size, hidden)


def config(shape: Shape, dtype: Dtype) -> dict[str, Any]:
    """What config.json says."""
    family = _FAMILIES[shape.architecture]
    common = {
        "architectures": [family.class_name],
        "model_type": shape.architecture.replace("-", "_"),
        "dtype": dtype,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": _MAX_MODEL_LEN,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    return common | family.extra(shape)


@dataclass(frozen=True, slots=True)
class _Family:
    class_name: str
    block: str
    projections: tuple[str, str, str]
    feed_forward: float
    head_norms: bool
    experts: Callable[[int], int]
    extra: Callable[[Shape], dict[str, Any]]


def _many_experts(width: int) -> int:
    return 8 if width < 1024 else 32 if width < 2048 else 128


_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_FAMILIES: dict[Architecture, _Family] = {
    "llama": _Family("LlamaForCausalLM", "mlp", _GATE_UP_DOWN, 3.5, False, lambda _: 0, lambda _: {}),
    "qwen3": _Family("Qwen3ForCausalLM", "mlp", _GATE_UP_DOWN, 3.0, True, lambda _: 0, lambda _: {}),
    "qwen3-moe": _Family(
        "Qwen3MoeForCausalLM",
        "mlp",
        _GATE_UP_DOWN,
        0.375,
        True,
        _many_experts,
        lambda shape: {
            "moe_intermediate_size": shape.intermediate_size,
            "num_experts": shape.num_experts,
            "num_experts_per_tok": min(8, shape.num_experts // 4),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
    ),
    "mixtral": _Family(
        "MixtralForCausalLM",
        "block_sparse_moe",
        ("w1", "w3", "w2"),
        3.5,
        False,
        lambda _: 8,
        lambda shape: {"num_local_experts": shape.num_experts, "num_experts_per_tok": 2},
    ),
}
