from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mball.errors import ConfigError
from mball.memory.spec import WorkerSpec
from mball.memory.vllm_options import OURS, arguments, environment

SPEC = WorkerSpec("m", "/models/m", socket_path="/run/m.sock", engine="vllm", max_num_seqs=4)


def given(**engine_args: Any) -> str:
    return " ".join(arguments(replace(SPEC, engine_args=engine_args), 1 << 30))


def test_what_mball_says() -> None:
    assert given() == (
        "--model /models/m --served-model-name m --load-format mball --max-num-seqs 4 --uds /run/m.sock "
        "--kv-cache-memory-bytes 1073741824 --enable-sleep-mode --worker-cls mball.memory.vllm_cpu.SleepingCpuWorker"
    )


def test_on_a_gpu_its_own_worker_is_extended() -> None:
    words = arguments(replace(SPEC, device="cuda:GPU-1"), 1 << 30)
    assert words[-2:] == ["--worker-extension-cls", "mball.memory.vllm_cuda.CudaRpc"]
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


def test_development_routes_are_open_and_nothing_is_reported_home() -> None:
    made = environment({"PATH": "/bin"})
    assert made["PATH"] == "/bin"
    assert made["VLLM_SERVER_DEV_MODE"] == "1"
    assert made["VLLM_NO_USAGE_STATS"] == "1"
