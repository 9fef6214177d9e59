"""The transformers engine on a CUDA device: the same tokens as on the CPU, before and after a swap."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mball.device.account import OpenAccount
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from mball.server.engine.engine import GenerateEngine
from tests.server.engine.driving import EngineFor, ModelDir, Oracle, prompts, reference, run_all

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODELS = ("llama", "qwen3", "qwen3_moe", "mistral_window")


@pytest.fixture
def cuda_engine(model_dir: ModelDir, request: pytest.FixtureRequest) -> Iterator[GenerateEngine]:
    spec = WorkerSpec(request.param, str(model_dir(request.param)), device="cuda", block_size=4)
    engine = open_engine(spec, OpenAccount())
    assert isinstance(engine, GenerateEngine)
    engine.promote(None)
    yield engine
    engine.close()


@pytest.mark.parametrize("cuda_engine", MODELS, indirect=True)
def test_greedy_tokens_are_the_reference_s(
    cuda_engine: GenerateEngine, model_dir: ModelDir, oracle: Oracle, request: pytest.FixtureRequest
) -> None:
    path: Path = model_dir(request.node.callspec.params["cuda_engine"])
    wanted = [reference(oracle(path), prompt, 12)[0] for prompt in prompts(6)]
    assert [run.tokens for run in run_all(cuda_engine, prompts(6))] == wanted
    cuda_engine.demote()
    cuda_engine.promote(None)
    assert [run.tokens for run in run_all(cuda_engine, prompts(6))] == wanted


@pytest.mark.parametrize("cuda_engine", ["llama"], indirect=True)
def test_a_seed_draws_the_same_as_on_the_cpu(
    cuda_engine: GenerateEngine, model_dir: ModelDir, engine_for: EngineFor
) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": list(range(6))}
    on_cpu = [run.tokens for run in run_all(engine_for(model_dir("llama")), prompts(6), **options)]
    assert [run.tokens for run in run_all(cuda_engine, prompts(6), **options)] == on_cpu


@pytest.mark.parametrize("cuda_engine", ["llama"], indirect=True)
def test_demoting_frees_the_device(cuda_engine: GenerateEngine) -> None:
    run_all(cuda_engine, prompts(2))
    held = cuda_engine.status()
    before = torch.cuda.memory_allocated()
    cuda_engine.demote()
    assert before - torch.cuda.memory_allocated() >= held.weights_bytes + held.kv_bytes
    assert not cuda_engine.status().resident
