"""What the adapter relies on in transformers, and what it makes of configurations and checkpoints."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from mball.device.account import OpenAccount
from mball.errors import TensorMismatch, UnsupportedCheckpoint
from mball.loader.checkpoint import Checkpoint
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from mball.server.engine import transformers_adapter as adapter
from tests.server.engine.conftest import CONFIGS, SMALL
from tests.server.engine.driving import EngineFor, ModelDir, Oracle


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_signatures_it_relies_on() -> None:
    assert parameters(get_model_conversion_mapping)[0] == "model"
    names = ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert parameters(rename_source_key)[:5] == names
    assert MergeModulelist(dim=0).dim == 0
    assert Concatenate(dim=1).dim == 1
    converter = WeightConverter(["a.*.x.weight"], ["a.x"], [MergeModulelist(dim=0)])
    assert (converter.source_patterns, converter.target_patterns) == (["a.*.x.weight"], ["a.x"])
    assert [type(operation) for operation in converter.operations] == [MergeModulelist]
    assert hasattr(PreTrainedModel, "_supports_attention_backend")
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
    assert "mball_paged" in AttentionInterface()
    assert hasattr(transformers.AutoModel, "_model_mapping")


def test_no_time_goes_into_values_of_weights_that_are_to_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    for name in ("uniform_", "normal_"):
        original = getattr(torch.Tensor, name)

        def spy(tensor: torch.Tensor, *how: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            given.append(name)
            return original(tensor, *how, **more)

        monkeypatch.setattr(torch.Tensor, name, spy)
    with adapter._weightless():
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    assert given == []
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(not buffer.is_meta and buffer.abs().sum() > 0 for buffer in model.buffers())
    AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    assert given != []


def test_models_give_our_attention_what_it_reads() -> None:
    """Every model of the tests calls attention with (module, query, key, value, mask, scaling=…) and layer_idx."""
    seen = []

    def spy(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        seen.append(
            (module.layer_idx, query.shape[-1], attention_mask, options.get("sliding_window"), options.get("softcap"))
        )
        assert isinstance(options["scaling"], float)
        return torch.zeros(1, query.shape[2], query.shape[1], query.shape[3]), None

    AttentionInterface.register("mball_spy", spy)
    for name, make in CONFIGS.items():
        seen.clear()
        model = AutoModelForCausalLM.from_config(make(), attn_implementation="mball_spy").eval()
        model(input_ids=torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([[0, 1, 0]]), use_cache=False)
        assert [layer for layer, *_ in seen] == [0, 1, 2], name
        assert all(mask is None for _, _, mask, _, _ in seen), "no mask function is registered, so no mask is built"
        if name == "gemma2_softcap":
            assert {window for *_, window, _ in seen} == {None, 9}
            assert {softcap for *_, softcap in seen} == {50.0}


def spec(path: Path, **options: Any) -> WorkerSpec:
    return WorkerSpec("tiny", str(path), "", "cpu", **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_are_those_that_transformers_loads(
    name: str, model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir(name)
    module = engine_for(path)._weights.module
    expected = oracle(path).state_dict()
    assert module.state_dict().keys() == expected.keys()
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    buffers = dict(oracle(path).named_buffers())
    assert dict(module.named_buffers()).keys() == buffers.keys()
    for key, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    assert not module.training


def test_experts_stored_one_by_one_are_fused_in_the_order_of_their_numbers(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor, tmp_path: Path
) -> None:
    """With eleven experts, 10 sorts before 2 as text."""
    config = CONFIGS["qwen3_moe"]()
    config.num_experts = 11
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    names = Checkpoint.open(tmp_path).tensors
    assert any("experts.10.gate_proj" in name for name in names), "the checkpoint is not one tensor per expert"
    module = engine_for(tmp_path)._weights.module
    for key, tensor in model.state_dict().items():
        assert torch.equal(module.state_dict()[key], tensor), key


def test_a_tied_parameter_takes_memory_once(smollm2: Path, engine_for: EngineFor) -> None:
    engine = engine_for(smollm2)
    module = engine._weights.module
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    assert engine.status().weights_bytes < 1.01 * Checkpoint.open(smollm2).nbytes


def test_end_of_sequence_ids_come_from_the_generation_config(model_dir: ModelDir, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(model_dir("llama"), path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17]}))
    config = adapter.read_config(spec(path))
    assert adapter.eos_token_ids(str(path), config) == {2, 17}
    (path / "generation_config.json").unlink()
    assert adapter.eos_token_ids(str(path), config) == {2}


def edited(path: Path, to: Path, **changes: object) -> Path:
    shutil.copytree(path, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "no_such_model"}, "not understood"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_what_is_not_served_is_refused_clearly(
    changes: dict[str, Any], says: str, model_dir: ModelDir, tmp_path: Path
) -> None:
    path = edited(model_dir("qwen3"), tmp_path / "model", **changes)
    with pytest.raises(UnsupportedCheckpoint, match=says):
        open_engine(spec(path), OpenAccount())


def test_unknown_dtype_is_refused(model_dir: ModelDir) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="float33"):
        open_engine(spec(model_dir("llama"), dtype="float33"), OpenAccount())


def resaved(path: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    to.mkdir()
    shutil.copy(path / "config.json", to)
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def test_a_tensor_too_few_or_too_many_is_named(model_dir: ModelDir, tmp_path: Path) -> None:
    source = model_dir("llama")
    lacking = resaved(source, tmp_path / "a", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(TensorMismatch, match=r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        open_engine(spec(lacking), OpenAccount())
    beyond = resaved(source, tmp_path / "b", lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    with pytest.raises(TensorMismatch, match=r"unexpected.*model\.extra\.weight"):
        open_engine(spec(beyond), OpenAccount())
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    open_engine(spec(resaved(source, tmp_path / "c", lambda tensors: tensors.update(stale))), OpenAccount()).close()


def test_a_checkpoint_without_the_model_s_prefix_is_found(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor, tmp_path: Path
) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors[name.removeprefix("model.")] = tensors.pop(name)

    path = resaved(model_dir("llama"), tmp_path / "bare", strip)
    module = engine_for(path)._weights.module
    for key, tensor in oracle(model_dir("llama")).state_dict().items():
        assert torch.equal(module.state_dict()[key], tensor), key


def test_dtype_comes_from_spec_config_or_checkpoint(model_dir: ModelDir, tmp_path: Path) -> None:
    path = model_dir("llama")
    checkpoint = Checkpoint.open(path)
    config = adapter.read_config(spec(path))
    assert adapter.choose_dtype(spec(path), config, checkpoint) == torch.float32
    assert adapter.choose_dtype(spec(path, dtype="bfloat16"), config, checkpoint) == torch.bfloat16
    config.dtype = None
    assert adapter.choose_dtype(spec(path), config, checkpoint) == torch.float32
    assert SMALL["vocab_size"] == config.vocab_size
