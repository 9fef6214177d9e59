"""Tiny models with random weights, written once a run, and the demo model where it was prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma2 import Gemma2Config
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmoe import OlmoeConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from mball.device.account import OpenAccount
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from mball.server.engine.engine import GenerateEngine
from tests.demo_models import demo_model

SMALL = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Far wider than trained models begin with: random models else repeat one token, which hides every fault.
    "initializer_range": 0.3,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama_untied_gqa1": lambda: LlamaConfig(**SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**SMALL, num_experts=5, num_experts_per_tok=3),
    "mistral_window": lambda: MistralConfig(**SMALL, sliding_window=7),
    "gemma2_softcap": lambda: Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=9),
}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(7)
            path = tmp_path_factory.mktemp("models") / name
            AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).save_pretrained(
                path, max_shard_size="100KB"
            )
            made[name] = path
        return made[name]

    return make


@pytest.fixture(scope="session")
def model_dir_wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some 50 MB: large enough to be seen in a process's memory."""
    config = LlamaConfig(**SMALL | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2})
    path = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def oracle() -> Callable[[Path], PreTrainedModel]:
    """The same model as transformers loads and runs it, with its plainest attention."""
    loaded: dict[Path, PreTrainedModel] = {}

    def load(path: Path) -> PreTrainedModel:
        if path not in loaded:
            loaded[path] = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return loaded[path]

    return load


@pytest.fixture
def engine_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GenerateEngine]]:
    opened: list[GenerateEngine] = []

    def open_one(path: Path, **options: Any) -> GenerateEngine:
        promote = options.pop("promote", True)
        account = options.pop("account", OpenAccount())
        spec = WorkerSpec("tiny", str(path), "", **{"device": "cpu", "block_size": 4, "threads": 1, **options})
        engine = open_engine(spec, account)
        assert isinstance(engine, GenerateEngine)
        opened.append(engine)
        if promote:
            engine.promote(None)
        return engine

    yield open_one
    for engine in opened:
        engine.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return demo_model("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Path:
    return demo_model("all-minilm-l6-v2")
