from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mball.errors import ConfigError
from mball.memory.spec import WorkerSpec
from mball.memory.vllm_options import (
    OURS,
    adapters,
    arguments,
    capture_size,
    check_kv,
    engine_id,
    environment,
    keeps_kv,
    kv_socket,
)

SPEC = WorkerSpec("m", "/models/m", socket_path="/run/m.sock", engine="vllm", max_num_seqs=4)


def given(**engine_args: Any) -> str:
    return " ".join(arguments(replace(SPEC, engine_args=engine_args), 1 << 30))


def test_what_mball_says() -> None:
    assert given() == (
        "--model /models/m --served-model-name m --load-format mball --max-num-seqs 4 --max-model-len auto "
        "--uds /run/m.sock "
        "--kv-cache-memory-bytes 1073741824 --enable-sleep-mode "
        "--middleware mball.server.worker.vllm_tenants.TenantSalt --worker-cls mball.memory.vllm_cpu.SleepingCpuWorker"
    )


def test_the_context_is_the_models_or_what_kv_has_room_for() -> None:
    assert "--max-model-len auto" in given()
    assert "--max-model-len 7" in given(**{"max-model-len": 7})
    assert "--max-model-len" not in " ".join(arguments(replace(SPEC, task="embed"), 1))


def test_on_a_gpu_its_own_worker_is_extended() -> None:
    words = arguments(replace(SPEC, device="cuda:GPU-1"), 1 << 30)
    extension = "--worker-extension-cls mball.memory.vllm_cuda.CudaRpc"
    assert " ".join(words).endswith(f"{extension} --gpu-memory-utilization 0.01")
    assert "--worker-cls" not in words


def test_the_models_own_options_are_given_by_vllms_names() -> None:
    spec = replace(SPEC, max_model_len=100, dtype="bfloat16", trust_remote_code=True, enable_prefix_caching=False)
    words = " ".join(arguments(spec, 1))
    assert "--max-model-len 100 --dtype bfloat16 --trust-remote-code --no-enable-prefix-caching" in words


def test_any_other_option_passes_through() -> None:
    assert "--tensor-parallel-size 2" in given(tensor_parallel_size=2)
    assert "--no-enable-prefix-caching" in given(enable_prefix_caching=False)
    assert "--enforce-eager " in given(**{"enforce-eager": True})
    assert '--compilation-config {"mode": 3}' in given(compilation_config={"mode": 3})
    assert "--lora-modules a=/a b=/b" in given(lora_modules=["a=/a", "b=/b"])
    assert "--quantization" not in given(quantization=None)


def test_the_operators_load_format_wins() -> None:
    assert "--load-format dummy" in given(load_format="dummy")
    assert "--load-format mball" not in given(load_format="dummy")


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_is_mballs_to_set_is_refused(name: str) -> None:
    for spelled in (name, name.replace("_", "-")):
        with pytest.raises(ConfigError, match=spelled):
            given(**{spelled: 1})


@pytest.mark.parametrize(
    ("busy", "most", "expected"),
    [(0, 256, None), (1, 256, 32), (16, 256, 32), (17, 256, 64), (100, 256, 256), (129, 256, None), (3, 16, None)],
)
def test_graphs_are_captured_of_what_is_asked_at_once(busy: int, most: int, expected: int | None) -> None:
    spec = replace(SPEC, device="cuda:GPU-1", max_num_seqs=most, busy_requests=busy)
    assert capture_size(spec) == expected
    words = " ".join(arguments(spec, 1))
    assert (f"--max-cudagraph-capture-size {expected} " in words) == (expected is not None)
    assert ("capture" in words) == (expected is not None)


@pytest.mark.parametrize(
    "name", ["compilation-config", "enforce_eager", "cudagraph_capture_sizes", "speculative_config"]
)
def test_what_the_operator_says_of_graphs_is_left_alone(name: str) -> None:
    spec = replace(SPEC, device="cuda:GPU-1", max_num_seqs=256, busy_requests=3)
    assert capture_size(replace(spec, engine_args={name: 1})) is None
    assert capture_size(replace(spec, device="cpu")) is None
    assert capture_size(replace(spec, engine_args={"seed": 1})) == 32


def test_development_routes_are_open_and_nothing_is_reported_home() -> None:
    made = environment({"PATH": "/bin"})
    assert made["PATH"] == "/bin"
    assert made["VLLM_SERVER_DEV_MODE"] == "1"
    assert made["VLLM_NO_USAGE_STATS"] == "1"
    assert not any(name.startswith("MBALL_VLLM_KV") for name in made)


KEEPS = replace(SPEC, kv_arena_bytes=1 << 30)


def transfer(spec: WorkerSpec) -> dict[str, Any]:
    words = arguments(spec, 1)
    found: dict[str, Any] = json.loads(words[words.index("--kv-transfer-config") + 1])
    return found


def test_kv_goes_to_host_memory_and_to_the_store_below_it() -> None:
    said = transfer(KEEPS)
    assert said["kv_load_failure_policy"] == "recompute"
    assert said["kv_connector_extra_config"] == {
        "spec_name": "HostTieringSpec",
        "spec_module_path": "mball.server.worker.vllm_host_kv",
        "cpu_bytes_to_use": 1 << 30,
        "secondary_tiers": [{"type": "mball"}],
    }
    assert "--prefix-caching-hash-algo sha256_cbor --enable-prompt-tokens-details" in " ".join(arguments(KEEPS, 1))
    on_gpu = transfer(replace(KEEPS, device="cuda:GPU-1"))["kv_connector_extra_config"]
    assert on_gpu["spec_name"] == "TieringOffloadingSpec"
    assert "spec_module_path" not in on_gpu


def test_no_two_engines_share_their_rows() -> None:
    assert engine_id(KEEPS) == engine_id(replace(KEEPS, model="other"))
    assert engine_id(KEEPS) != engine_id(replace(KEEPS, socket_path="/run/other.sock"))


def test_its_processes_are_told_where_the_store_is_asked_for() -> None:
    made = environment({}, kv_socket(KEEPS), "abc")
    assert made["MBALL_VLLM_KV"] == str(Path("/run/m.kv"))
    assert made["MBALL_VLLM_KV_IDENTITY"] == "abc"


@pytest.mark.parametrize(
    "without",
    [
        {"kv_arena_bytes": None},
        {"kv_arena_bytes": 0},
        {"enable_prefix_caching": False},
        {"engine_args": {"enable_prefix_caching": False}},
        {"task": "embed"},
    ],
)
def test_without_room_or_a_prefix_cache_no_kv_is_kept(without: dict[str, Any]) -> None:
    spec = replace(KEEPS, **without)
    assert not keeps_kv(spec)
    assert "--kv-transfer-config" not in arguments(spec, 1)


@pytest.mark.parametrize(
    ("engine_args", "told"),
    [
        ({"kv-transfer-config": {}}, "leave one out"),
        ({"enable_lora": True}, "adapter"),
        ({"prefix-caching-hash-algo": "xxhash"}, "sha256_cbor"),
    ],
)
def test_kv_that_could_be_anothers_is_not_kept(engine_args: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        arguments(replace(KEEPS, engine_args=engine_args), 1)
    check_kv(None, engine_args)


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (["a=/a", "b=/b"], ["a", "b"]),
        ("a=/a", ["a"]),
        ([{"name": "a", "path": "/a"}, '{"name": "b", "path": "/b"}'], ["a", "b"]),
        ({"name": "a", "path": "/a"}, ["a"]),
        (None, []),
        ([], []),
    ],
)
def test_adapters_have_the_names_that_vllm_gives_them(modules: Any, names: list[str]) -> None:
    assert adapters({"lora-modules": modules, "enable_lora": True}) == names


@pytest.mark.parametrize("module", ["=/a", "{", "{}", {"path": "/a"}, {"name": 3}, 7])
def test_what_names_no_adapter_is_refused(module: Any) -> None:
    with pytest.raises(ConfigError, match="NAME=PATH"):
        adapters({"lora_modules": [module]})


@pytest.mark.parametrize("value", ["2", 0, -1, 1.5, None])
def test_a_number_of_gpus_is_one(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"tensor-parallel-size is .*, not a number of GPUs"):
        given(**{"tensor-parallel-size": value})


def test_it_has_a_rank_for_each() -> None:
    assert SPEC.ranks == 1
    assert replace(SPEC, engine_args={"tensor-parallel-size": 2, "pipeline_parallel_size": 3}).ranks == 6


def test_on_several_gpus_no_layer_is_elsewhere() -> None:
    several = replace(SPEC, device="cuda:1+cuda:2", engine_args={"tensor_parallel_size": 2}, resident_layers=3)
    with pytest.raises(ConfigError, match="on 2 GPUs all its layers stay there"):
        arguments(several, 1)
