"""vLLM's load format `mball` against its default loader, in real vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import vllm_python

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16),
    "phi3": transformers.Phi3Config(**SIZES),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    ),
    "opt": transformers.OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
    ),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=256),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vllm_python.vllm_python()
    folder = tmp_path_factory.mktemp("formats")
    models = folder / "models"
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(models / name, max_shard_size="60KB" if name == "qwen2" else "1GB")
    quantise(shutil.copytree(models / "llama", models / "int8"))
    pickled = shutil.copytree(models / "llama", models / "pickled")
    weights = transformers.AutoModelForCausalLM.from_pretrained(pickled).state_dict()
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    torn = shutil.copytree(models / "llama", models / "torn-header")
    data = (torn / "model.safetensors").read_bytes()
    # A field that vLLM's reader skips, and ours has no room for.
    (torn / "model.safetensors").write_bytes(_with_another_field(data))
    return models


@pytest.fixture(scope="module")
def loaded(models: Path) -> dict[str, Any]:
    """Every model by both loaders, compared by one process of vLLM's."""
    [told] = by_ranks(models, 1)
    return told


def by_ranks(models: Path, ranks: int) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("vllm_formats.py")
    found: list[dict[str, Any]] = vllm_python.run(
        script, str(models), str(models / "llama"), str(ranks), "0", folder=models.parent, VLLM_DIST_IDENT="formats"
    )
    return found


def quantise(folder: Path) -> None:
    """To int8 by channel, as compressed-tensors stores it: weights and scales of other dtypes side by side."""
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        stored[name], stored[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))


def _with_another_field(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip().replace(b'{"dtype"', b'{"unheard":0,"dtype"', 1)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.parametrize("name", [*CONFIGS, "int8"])
def test_every_tensor_is_what_the_default_loader_makes(loaded: dict[str, Any], name: str) -> None:
    alike = loaded[name]
    assert alike["tensors"] > 10
    assert not alike["differ"]
    assert not alike["missing"]
    assert alike["read"], "it was not ours that read it"
    assert not alike["read_by_auto"], "compared with itself"


def test_several_shards_are_read_as_one(loaded: dict[str, Any]) -> None:
    assert len(loaded["qwen2"]["read"]) > 2


@pytest.fixture(scope="module")
def parts(models: Path, loaded: dict[str, Any]) -> list[dict[str, Any]]:
    """The same by two ranks of a tensor parallel group."""
    for unfit in ("pickled", "torn-header"):
        shutil.rmtree(models / unfit)
    return by_ranks(models, 2)


@pytest.mark.parametrize("name", [*CONFIGS, "int8"])
def test_a_rank_reads_what_is_its_own_and_it_is_the_same(
    loaded: dict[str, Any], parts: list[dict[str, Any]], name: str
) -> None:
    assert len(parts) == 2
    for rank in parts:
        assert rank[name]["tensors"] == loaded[name]["tensors"]
        assert not rank[name]["differ"]
        assert not rank[name]["missing"]
        assert rank[name]["read"], "it was not ours that read it"
        # What is on every rank, and headers, are a large part of models as small as these.
        assert rank[name]["read_bytes"] < 0.65 * loaded[name]["stored_bytes"]


@pytest.mark.parametrize("name", ["pickled", "torn-header"])
def test_what_is_not_for_it_is_left_to_the_default_loader(loaded: dict[str, Any], name: str) -> None:
    assert loaded[name]["tensors"] > 10
    assert not loaded[name]["differ"]
    assert not loaded[name]["missing"]
