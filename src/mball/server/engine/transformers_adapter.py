"""The one file that knows the insides of transformers (5.17 to 5.23).

Modules are built without weights on torch's meta device; which checkpoint tensor fills which parameter comes from
transformers' own conversion tables; the loader reads the bytes. What is relied on beyond the public API are two
functions of `conversion_mapping`, `initialization.guard_torch_init_functions`, `core_model_loading.rename_source_key`
and the two operations that lay whole tensors one after the other; tests/server/engine/test_transformers_adapter.py
checks them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import guard_torch_init_functions

from mball.errors import UnsupportedCheckpoint
from mball.loader import dtypes
from mball.loader.checkpoint import Checkpoint, TensorInfo
from mball.loader.weights import Piece
from mball.memory.spec import WorkerSpec
from mball.server.engine import attention
from mball.server.engine.experts import expert_modules
from mball.server.engine.kv_cache import KVGeometry

# transformers makes its table when it is first asked: here a zygote does it for all its workers.
get_checkpoint_conversion_mapping("")  # type: ignore[no-untyped-call]
AttentionInterface.register(attention.NAME, attention.paged_attention)

_INITIALISED = "_is_hf_initialized"
"""transformers' mark on a tensor that its `initialization` functions leave as it is."""

_PAGED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Model:
    """A module on the meta device, in eval mode, and what fills it: see `mball.loader.weights.Weights.bind`.

    `ignored` are tensors of the checkpoint that are known to have no use; `layers` the decoder's, which run one after
    the other, and `experts` the modules of those that hold a mixture's: none where they were not found.
    """

    module: torch.nn.Module
    sources: dict[str, list[Piece]]
    ignored: frozenset[str]
    layers: tuple[torch.nn.Module, ...] = ()
    experts: tuple[torch.nn.Module, ...] = ()


def read_config(spec: WorkerSpec) -> PreTrainedConfig:
    """The model's config.json. Raises UnsupportedCheckpoint where transformers does not know it."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            spec.path, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedCheckpoint(f"its configuration is not understood: {error}", file=spec.path) from error
    if getattr(config, "quantization_config", None):
        raise UnsupportedCheckpoint("its weights are quantised, which this engine does not serve", file=spec.path)
    return config


def text_config(config: PreTrainedConfig) -> Any:
    """The part of a composite configuration that describes the language model."""
    return config.get_text_config(decoder=True)


def choose_dtype(spec: WorkerSpec, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """`spec.dtype`, else the configuration's, else that of most of the checkpoint's bytes."""
    if spec.dtype is not None:
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UnsupportedCheckpoint(f"no such floating point dtype: {spec.dtype!r}", file=spec.path)
        return dtype
    configured = getattr(config, "dtype", None)
    if isinstance(configured, torch.dtype):
        return configured
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    found = dtypes.TORCH.get(max(sizes, key=lambda name: sizes[name])) if sizes else None
    return found if found is not None and found.is_floating_point else torch.float32


def kv_geometry(spec: WorkerSpec, config: PreTrainedConfig, dtype: torch.dtype) -> KVGeometry:
    """Raises UnsupportedCheckpoint for models that keep more than plain keys and values per layer."""
    text = text_config(config)
    unusual = set(getattr(text, "layer_types", None) or ()) - _PAGED_LAYERS
    if unusual:
        raise UnsupportedCheckpoint(f"layers of type {', '.join(sorted(unusual))} are not served", file=spec.path)
    for field in ("kv_lora_rank", "num_kv_shared_layers", "attention_chunk_size"):
        if getattr(text, field, None):
            raise UnsupportedCheckpoint(f"models with {field} are not served by this engine", file=spec.path)
    heads = text.num_attention_heads
    return KVGeometry(
        num_layers=text.num_hidden_layers,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype=dtype,
    )


def eos_token_ids(path: str, config: PreTrainedConfig) -> frozenset[int]:
    """From generation_config.json where there is one, else from config.json."""
    found: Any = None
    if (Path(path) / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    if found is None:
        found = getattr(text_config(config), "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, Iterable) else [found])


def build_generator(
    spec: WorkerSpec, config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype, geometry: KVGeometry
) -> Model:
    """A causal language model whose attention is ours. Raises UnsupportedCheckpoint."""
    module = _build(AutoModelForCausalLM, spec, config, dtype, attention.NAME)
    if not getattr(module, "_supports_attention_backend", False):
        raise UnsupportedCheckpoint(f"{type(module).__name__} takes no attention of ours", file=spec.path)
    if "logits_to_keep" not in inspect.signature(module.forward).parameters:
        raise UnsupportedCheckpoint(f"{type(module).__name__} gives logits only for all tokens", file=spec.path)
    _check_attention(spec, module, geometry)
    model = _filled(spec, module, checkpoint, headless=False)
    layers = _decoder_layers(module, geometry.num_layers)
    return replace(model, layers=layers, experts=expert_modules(layers))


def build_encoder(spec: WorkerSpec, config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> Model:
    """A model without head, for padded batches. Raises UnsupportedCheckpoint."""
    return _filled(spec, _build(AutoModel, spec, config, dtype, "sdpa"), checkpoint, headless=True)


def build_tiny(geometry: KVGeometry, device: torch.device) -> torch.nn.Module:
    """A model of that geometry with random weights on `device`, whose attention is ours: a few MiB for one layer and
    one KV head."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=2 * geometry.num_kv_heads,
        num_key_value_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=2048,
    )
    auto: Any = AutoModelForCausalLM
    module: torch.nn.Module = auto.from_config(config, dtype=geometry.dtype, attn_implementation=attention.NAME)
    return module.to(device).eval()


def _build(
    auto: Any, spec: WorkerSpec, config: PreTrainedConfig, dtype: torch.dtype, implementation: str
) -> PreTrainedModel:
    options: dict[str, Any] = {"trust_remote_code": True} if spec.trust_remote_code else {}
    model_class = auto._model_mapping.get(type(config), None)
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    try:
        with _weightless():
            module = auto.from_config(config, dtype=dtype, attn_implementation=implementation, **options)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise UnsupportedCheckpoint(f"transformers builds no model of it: {error}", file=spec.path) from error
    if not isinstance(module, PreTrainedModel):
        raise UnsupportedCheckpoint(f"{type(module).__name__} is no transformers model", file=spec.path)
    module.tie_weights()  # init_empty_weights makes a parameter of its own of every name
    module.train(False)
    return module


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters are names and shapes alone, and neither time nor memory is spent on them; buffers are computed by the
    constructors and hold real values."""
    with init_empty_weights(include_buffers=False), guard_torch_init_functions(), _Unallocated():
        register = torch.nn.Module.register_parameter

        def registered(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
            register(module, name, param)
            if param is not None:
                setattr(module._parameters[name], _INITIALISED, True)

        torch.nn.Module.register_parameter = registered  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Unallocated(TorchFunctionMode):
    """What is made without values is a parameter: as memory, if never touched, it would count against a limit of the
    process. Buffers are made with values; one that is not is refused where tensors are bound."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _check_attention(spec: WorkerSpec, module: PreTrainedModel, geometry: KVGeometry) -> None:
    layers = set()
    for name, part in module.named_modules():
        if not hasattr(part, "layer_idx") or not hasattr(part, "head_dim"):
            continue
        layers.add(part.layer_idx)
        projection = getattr(part, "k_proj", None)
        width = getattr(projection, "out_features", geometry.num_kv_heads * geometry.head_dim)
        if part.head_dim != geometry.head_dim or width != geometry.num_kv_heads * geometry.head_dim:
            raise UnsupportedCheckpoint(f"{name}: its keys have another shape than other layers'", file=spec.path)
        if hasattr(part, "sinks"):
            raise UnsupportedCheckpoint("attention with sinks is not served by this engine", file=spec.path)
    if layers and layers != set(range(geometry.num_layers)):
        raise UnsupportedCheckpoint(
            f"{len(layers)} attention layers in a model of {geometry.num_layers}", file=spec.path
        )


def _decoder_layers(module: PreTrainedModel, num_layers: int) -> tuple[torch.nn.Module, ...]:
    for part in module.modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == num_layers:
            attention_of = [{m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for layer in part]
            if attention_of == [{number} for number in range(num_layers)]:
                return tuple(part)
    return ()


def _filled(spec: WorkerSpec, module: PreTrainedModel, checkpoint: Checkpoint, *, headless: bool) -> Model:
    wanted = module.state_dict(keep_vars=True)
    groups, unused = _group(module, checkpoint.tensors, wanted)
    sources: dict[str, list[Piece]] = {}
    ignored: set[str] = set()
    filled: set[int] = set()
    for name, found in groups.items():
        if id(wanted[name]) in filled:  # tied, and stored under each of its names
            ignored.update(part for parts in found.by_pattern.values() for part in parts)
            continue
        filled.add(id(wanted[name]))
        sources[name] = _pieces(spec, name, wanted[name], found, checkpoint.tensors)
    patterns = [re.compile(pattern) for pattern in module._keys_to_ignore_on_load_unexpected or ()]
    ignored.update(name for name in unused if _is_known_extra(name, patterns, headless=headless))
    return Model(module, sources, frozenset(ignored))


def _is_known_extra(name: str, patterns: list[re.Pattern[str]], *, headless: bool) -> bool:
    """Tensors that checkpoints carry and models compute themselves, or that belong to a head which is not built."""
    if any(pattern.search(name) for pattern in patterns) or "rotary_emb.inv_freq" in name:
        return True
    if name.rsplit(".", 1)[-1] in ("position_ids", "masked_bias") or re.search(r"(^|\.)pooler\.", name):
        return True
    return headless and re.match(r"(cls|lm_head|score|classifier)\.", name) is not None


@dataclass(slots=True)
class _Group:
    """The checkpoint tensors of one parameter, by the converter's pattern that each matched (None: a plain one)."""

    converter: Any
    by_pattern: dict[str | None, list[str]]


def _group(
    module: PreTrainedModel, tensors: Mapping[str, TensorInfo], wanted: dict[str, Any]
) -> tuple[dict[str, _Group], set[str]]:
    transforms = get_model_conversion_mapping(module)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, _Group] = {}
    unused: set[str] = set()
    prefix = module.base_model_prefix
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            unused.add(name)
            continue
        converter = of_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(target, _Group(converter, {}))
        group.by_pattern.setdefault(pattern, []).append(name)
    return groups, unused


def _pieces(
    spec: WorkerSpec, target: str, tensor: torch.Tensor, group: _Group, tensors: Mapping[str, TensorInfo]
) -> list[Piece]:
    """Where each checkpoint tensor lies in the parameter, in bytes of the parameter's dtype.

    A fused parameter is understood where its parts lie in it whole: experts stacked along the first dimension, and
    per expert e.g. gate above up.
    """
    if group.converter is None or group.converter.target_patterns == group.converter.source_patterns:
        names = group.by_pattern[next(iter(group.by_pattern))]
        return [Piece(names[0], 0)]
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in group.converter.operations]
    columns = [group.by_pattern[pattern] for pattern in group.converter.source_patterns if pattern in group.by_pattern]
    if operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        order = [name for row in zip(*columns, strict=True) for name in row]
    elif operations == [(Concatenate, 0)]:
        order = [name for column in columns for name in column]
    else:
        listed = ", ".join(f"{kind.__name__}(dim={dim})" for kind, dim in operations)
        raise UnsupportedCheckpoint(f"its parts are put together by {listed}", file=spec.path, tensor=target)
    pieces, offset = [], 0
    for name in order:
        pieces.append(Piece(name, offset))
        count = 1
        for size in tensors[name].shape:
            count *= size
        offset += count * tensor.element_size()
    return pieces
