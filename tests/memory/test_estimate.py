"""What a model will take, from its files: the same as its engine says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mball.device.simulated import SimulatedDevice
from mball.errors import ModelDoesNotFit
from mball.memory.estimate import Estimate, estimate, revision, streamed
from mball.memory.spec import ModelSpec, WorkerSpec
from mball.server.engine import footprint
from mball.units import GiB, MiB
from tests.demo_models import demo_model
from tests.fake_worker import Knobs
from tests.memory.conftest import Serve
from tests.sparse_model import sparse_model

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


def folder(path: Path, config: dict[str, Any] | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file({"a": torch.zeros(10, 3, dtype=dtype), "b": torch.zeros(5, dtype=dtype)}, path / "model.safetensors")
    return path


def spec(path: Path, **options: Any) -> WorkerSpec:
    return WorkerSpec("m", str(path), **options)


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-fp32", "all-minilm-l6-v2"])
def test_it_is_what_the_engine_says(name: str) -> None:
    path = demo_model(name)
    task = "embed" if "minilm" in name else "generate"
    for options in ({}, {"max_model_len": 4096}, {"kv_cache_bytes": 50_000_000}, {"dtype": "float32"}):
        given = spec(path, task=task, **options)
        said = footprint(given)
        assert estimate(given) == Estimate(said.weights_bytes, said.kv_bytes)


def test_by_hand(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    block_bytes = 16 * 2 * 2 * 2 * 8 * 2
    assert estimate(spec(path, max_model_len=100, max_num_seqs=3)) == Estimate(35 * 2, (1 + 3 * 7) * block_bytes)
    assert estimate(spec(path, dtype="float32", kv_cache_bytes=10 * block_bytes)) == Estimate(35 * 4, 10 * block_bytes)
    assert estimate(spec(path, task="embed")) == Estimate(35 * 2, 0)


def test_what_can_never_fit_whole_is_streamed_if_it_can_be(tmp_path: Path) -> None:
    large = spec(demo_model("smollm2-135m"), kv_cache_bytes=20 * MiB)
    assert streamed(large, 200 * MiB) == dataclasses.replace(large, resident_layers="auto")
    assert streamed(large, 80 * MiB) is None, "its embeddings, two layers and KV are more"
    assert streamed(dataclasses.replace(large, kv_cache_bytes=200 * MiB), 200 * MiB) is None
    assert streamed(dataclasses.replace(large, resident_layers=99), 200 * MiB) is None, "it was said how"
    assert streamed(dataclasses.replace(large, engine="vllm"), 200 * MiB) is None
    assert streamed(spec(demo_model("all-minilm-l6-v2"), task="embed"), 50 * MiB) is None
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": torch.zeros(256, 1024)
        for layer, expert in itertools.product(range(2), range(8))
    }
    mixture = spec(folder(tmp_path / "mixture"), kv_cache_bytes=MiB)
    save_file({"model.embed.weight": torch.zeros(10, 10), **experts}, tmp_path / "mixture" / "model.safetensors")
    assert streamed(mixture, 10 * MiB) == dataclasses.replace(mixture, resident_experts="auto")


def test_vllm_is_to_have_layers_in_host_memory_where_a_model_does_not_fit(tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "m", layers=32, layer_bytes=448 * MiB, rest_bytes=2 * GiB)
    large = spec(path, engine="vllm", device="cuda:GPU-1", kv_cache_bytes=1 * GiB)
    assert estimate(large) == Estimate(16 * GiB, 1 * GiB)
    colder = streamed(large, 14 * GiB)
    assert colder is not None
    assert isinstance(colder.resident_layers, int)
    found = estimate(colder)
    assert found is not None
    assert found.cold is not None
    assert found.weights_bytes * 9 // 8 + (1 + 2) * GiB < 14 * GiB, "with vLLM's own and an eighth"
    assert found.cold_bytes == found.cold.count * 448 * MiB
    assert 16 * GiB + found.cold.prefetch_step * 448 * MiB == found.weights_bytes + found.cold_bytes
    assert found == estimate(dataclasses.replace(large, resident_layers="auto", device_memory_bytes=14 * GiB))
    assert streamed(colder, 14 * GiB) is None
    assert streamed(large, 5 * GiB) is None, "two buffers and what is no layer, KV and vLLM's own are more"
    for other in ({"device": "cpu"}, {"task": "embed"}, {"engine_args": {"cpu-offload-gb": 4}}):
        assert streamed(dataclasses.replace(large, **other), 14 * GiB) is None


def test_layers_are_not_left_to_a_host_that_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse_model(tmp_path / "m", layers=32, layer_bytes=448 * MiB, rest_bytes=2 * GiB)
    large = spec(path, engine="vllm", device="cuda:GPU-1", kv_cache_bytes=1 * GiB)
    assert streamed(large, 14 * GiB) is not None
    monkeypatch.setattr("mball.memory.estimate.memory_bytes", lambda: 1 * GiB)
    assert streamed(large, 14 * GiB) is None


def test_an_index_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder(tmp_path / "other")
    path = folder(tmp_path / "m")
    (path / "model.safetensors").unlink()
    places = {"a": "../other/model.safetensors", "b": "../other/model.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert estimate(spec(path)) is None


def test_files_that_do_not_tell_are_no_failure(tmp_path: Path) -> None:
    assert estimate(spec(tmp_path / "none")) is None
    path = folder(tmp_path / "m")
    (path / "config.json").write_text('["no object"]')
    assert estimate(spec(path)) is None
    (path / "config.json").write_text(json.dumps({"num_attention_heads": 0, "num_hidden_layers": 1}))
    assert estimate(spec(path)) is None
    folder(path)
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert estimate(spec(path)) is None


def test_what_is_quantised_takes_what_it_is_stored_as(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {**CONFIG, "dtype": "bfloat16"})
    tensors = {
        "layers.0.qweight": torch.zeros(100, dtype=torch.int32),
        "layers.0.scales": torch.zeros(10, dtype=torch.float32),
        "layers.1.weight": torch.zeros(1000).to(torch.float8_e4m3fn),
    }
    save_file(tensors, path / "model.safetensors")
    found = estimate(spec(path, engine="vllm", kv_cache_bytes=0))
    assert found is not None
    assert found.weights_bytes == 100 * 4 + 10 * 2 + 1000


def test_kv_is_what_vllm_keeps_of_a_token(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {**CONFIG, "max_position_embeddings": 64})
    plain = spec(path, engine="vllm", device="cuda:GPU-1", max_num_seqs=3)
    one = estimate(plain)
    assert one is not None
    for given in ({"kv_cache_dtype": "fp8"}, {"kv-cache-dtype": "fp8_e5m2"}):
        half = estimate(dataclasses.replace(plain, engine_args=given))
        assert half is not None
        assert half.kv_bytes == one.kv_bytes // 2
    latent = folder(
        tmp_path / "l", {**CONFIG, "max_position_embeddings": 64, "kv_lora_rank": 20, "qk_rope_head_dim": 4}
    )
    for tensor, device in ((1, "cuda:0"), (2, "cuda:0+cuda:1")):
        found = estimate(spec(latent, engine="vllm", device=device, engine_args={"tensor_parallel_size": tensor}))
        assert found is not None
        # Each GPU has all of it: there are no heads to divide.
        assert found.kv_bytes == (1 + 8 * 4) * 16 * 2 * (20 + 4) * 2


@pytest.mark.parametrize(
    ("files", "nbytes"),
    [
        ({"pytorch_model-1.bin": 100, "pytorch_model-2.bin": 50, "training_args.bin": 7}, 150),
        ({"model.pt": 100, "optimizer.pt": 900}, 100),
        ({"consolidated.safetensors": 100, "consolidated.00.pth": 100}, 100),
        ({"m.Q4_K_M.gguf": 100}, 100),
        ({"training_args.bin": 7}, None),
    ],
)
def test_files_that_vllm_alone_reads_count_by_their_size(
    tmp_path: Path, files: dict[str, int], nbytes: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name, size in files.items():
        (tmp_path / name).write_bytes(bytes(size))
    served = spec(tmp_path, engine="vllm", device="cuda:GPU-1", kv_cache_bytes=1 << 20)
    assert estimate(served) == (None if nbytes is None else Estimate(nbytes, 1 << 20))
    assert estimate(dataclasses.replace(served, engine="transformers")) is None
    assert streamed(served, 10) is None
    assert estimate(dataclasses.replace(served, resident_layers=1)) is None, "of their layers nothing is known"


def test_a_revision_changes_with_the_files_and_with_what_is_served_of_them(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    first = revision(spec(path))
    assert revision(spec(path, socket_path="/run/other", threads=7)) == first
    assert revision(spec(path, max_model_len=99)) != first
    assert revision(spec(path, engine="vllm")) != first
    assert revision(spec(path, environment_digest="ab")) != first
    vllm = [
        spec(path, engine="vllm", engine_args=args) for args in ({}, {"quantization": "fp8"}, {"quantization": "awq"})
    ]
    assert len({revision(each) for each in vllm}) == 3
    os.utime(path / "model.safetensors", ns=(1, 1))
    assert revision(spec(path)) != first
    for name in ("pytorch_model.bin", "m.gguf"):
        before = revision(spec(path))
        (path / name).write_bytes(b"x")
        assert revision(spec(path)) != before
    assert revision(spec(tmp_path / "none")) == revision(spec(tmp_path / "none"))


def test_a_gpu_of_several_has_its_share(tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "m", layers=4, layer_bytes=10 * MiB, rest_bytes=20 * MiB)
    whole = WorkerSpec("m", str(path), device="cuda:1", engine="vllm")
    spread = dataclasses.replace(whole, device="cuda:1+cuda:2", engine_args={"tensor_parallel_size": 2})
    one, each, said = estimate(whole), estimate(spread), estimate(dataclasses.replace(spread, kv_cache_bytes=9 * MiB))
    assert one is not None
    assert one.kv_bytes > 0
    assert each == Estimate(30 * MiB, one.kv_bytes // 2)
    # As vLLM takes it: of each GPU.
    alone = estimate(dataclasses.replace(whole, kv_cache_bytes=9 * MiB))
    assert alone is not None
    assert said == Estimate(30 * MiB, alone.kv_bytes)
    assert estimate(dataclasses.replace(spread, device="cpu")) == one
    for options, kv_bytes in (
        ({"tensor_parallel_size": 4}, one.kv_bytes // 2),  # two heads: each is on two GPUs
        ({"pipeline_parallel_size": 4}, one.kv_bytes // 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, one.kv_bytes // 4),
    ):
        assert estimate(dataclasses.replace(spread, engine_args=options)) == Estimate(15 * MiB, kv_bytes)
    assert streamed(spread, 10 * MiB) is None


def test_the_gateway_learns_it_without_torch(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    code = (
        "import sys; from mball.memory.estimate import estimate; from mball.memory.spec import WorkerSpec; "
        f"assert estimate(WorkerSpec('m', {str(path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_one_that_can_never_fit_is_refused_with_the_numbers_before_any_worker_is_started(
    serve: Serve, tmp_path: Path
) -> None:
    gpus = [SimulatedDevice.create(tmp_path / f"gpu{n}", (50 + 10 * n) * MiB, context_bytes=MiB) for n in range(2)]
    path = folder(tmp_path / "m")
    large = WorkerSpec("large", str(path), kv_cache_bytes=100 * MiB)
    small = WorkerSpec("small", str(path), kv_cache_bytes=54 * MiB)
    running = await serve(
        ModelSpec(large), ModelSpec(small, environment=Knobs(8 * MiB, 4 * MiB).environment()), on=gpus
    )
    says = r"large: needs at least 100 MiB \(weights 70 B, KV 100 MiB\), the device's budget is 60\.0 MiB in all: raise"
    for _ in range(2):
        with pytest.raises(ModelDoesNotFit, match=says):
            await running.ask("large")
    state = running.state("large")
    assert (state["starts"], state["shown_as"], state["device"]) == (0, "failed", None)
    assert await running.ask("small") == "small 1 2 3 "
    assert str(running.state("small")["device"]).endswith("gpu1"), "the only one where it can fit"
