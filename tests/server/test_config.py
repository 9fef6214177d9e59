import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from mball.device.cpu import CpuDevice
from mball.device.host import memory_bytes
from mball.device.simulated import SimulatedDevice
from mball.errors import ConfigError
from mball.server.catalog import budget, build_manager, dram_budget, model_spec, model_specs, swap_settings
from mball.server.config import Config, json_schema, load_config
from mball.units import GiB, MiB

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "examples").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    file = folder / "mball.yaml"
    file.write_text(text)
    return file


def test_the_later_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "port: 1\nhost: from-file\ndram_bytes: 1GiB\nmodels: [a]\n")
    monkeypatch.setenv("MBALL_PORT", "2")
    monkeypatch.setenv("MBALL_HOST", "from-env")
    config = load_config(file, {"port": 3, "host": None})
    assert (config.port, config.host, config.dram_bytes) == (3, "from-env", 1 * GiB)


def test_models_lie_beside_the_file_and_are_named_after_their_folder(tmp_path: Path) -> None:
    file = write(tmp_path, "models:\n - models/a\n - {path: /m/b, name: zed, kv_cache_memory_bytes: 64MiB}\n")
    first, second = load_config(file).models
    assert (first.path, first.name) == (tmp_path / "models/a", "a")
    assert (second.path, second.name, second.kv_cache_memory_bytes) == (Path("/m/b"), "zed", 64 * MiB)


def test_devices_are_one_name_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(write(tmp_path, "models: [a]")).device == ("cpu",)
    assert load_config(write(tmp_path, "device: cuda")).device == ("cuda",)
    assert load_config(write(tmp_path, "device: [cuda:0, cuda:GPU-1]")).device == ("cuda:0", "cuda:GPU-1")
    monkeypatch.setenv("MBALL_DEVICE", "simulated:/a,b,simulated:/c")
    assert load_config().device == ("simulated:/a,b", "simulated:/c")
    assert load_config(None, {"device": ["cuda:0", "cuda:1"]}).device == ("cuda:0", "cuda:1")


def test_a_model_may_be_served_on_one_device_alone(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    SimulatedDevice.create(tmp_path / "gpu", 1 * GiB)
    text = f"device: simulated:{tmp_path}/gpu\nmodels: [a, {{path: b, device: 'simulated:{tmp_path}/gpu'}}]"
    config = load_config(write(tmp_path, text))
    anywhere, there = (model_spec(model, config) for model in config.models)
    assert (anywhere.devices, there.devices) == ((), (f"simulated:{tmp_path}/gpu",))


def test_a_model_whose_device_is_another_is_refused(tmp_path: Path) -> None:
    for name in ("gpu", "other"):
        SimulatedDevice.create(tmp_path / name, 1 * GiB)
    text = f"device: simulated:{tmp_path}/gpu\nmodels: [{{path: b, device: 'simulated:{tmp_path}/other'}}]"
    with pytest.raises(ConfigError, match=r"b: its device is simulated:.*/other, and those here are simulated:.*/gpu"):
        build_manager(load_config(write(tmp_path, text)), tmp_path)


def test_several_devices_can_be_one(tmp_path: Path) -> None:
    group = f"simulated:{tmp_path}/one+simulated:{tmp_path}/two"
    text = f"device: {group}\nmodels: [{{path: b, engine: vllm, engine_args: {{tensor_parallel_size: 2}}}}]"
    config = load_config(write(tmp_path, text))
    manager = build_manager(config, tmp_path)
    assert [slot.name for slot in manager._devices] == [group]
    assert all(SimulatedDevice.open(tmp_path / name).total_bytes == 2 * GiB for name in ("one", "two"))


def test_a_gpu_keeps_something_for_others() -> None:
    class Gpu(CpuDevice):
        name = "cuda:GPU-1"

        def __init__(self, total_bytes: int) -> None:
            self.total_bytes = total_bytes

    assert budget(CpuDevice()) == min(2 * GiB, memory_bytes() // 2)
    assert budget(Gpu(80 * GiB)) == 80 * GiB - 80 * GiB // 32
    assert budget(Gpu(8 * GiB)) == 8 * GiB - 512 * MiB


def test_beside_a_gpu_half_of_the_hosts_memory_is_for_what_leaves_it() -> None:
    for name in ("cuda", "cuda:0+cuda:1"):
        assert dram_budget(Config(device=(name,))) == memory_bytes() // 2
    assert dram_budget(Config()) == 4 * GiB
    assert dram_budget(Config(device=("cuda",), dram_bytes=0)) == 0


def test_a_flag_replaces_the_models_of_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "models: [a]\n"), {"models": [{"path": Path("here/b")}]})
    assert [str(model.path) for model in config.models] == ["here/b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [{path: a, foo: 1}]", r"models\.0\.foo"),
        ("port: many", "port"),
        ("port: 70000", "port"),
        ("a: [", "parsing"),
        ("3", "mapping"),
        ("models: [a, b/a]", "two models are called 'a'"),
        ("models: [{name: x}]", r"models\.0\.path"),
        ("device_memory_bytes: 3XB", "device_memory_bytes.*not a size"),
        ("device: tpu", "device"),
        ("device: [cuda:0, tpu]", r"device\.1"),
        ("device: []", "no device is named"),
        ("device: [cpu, cuda:0]", "several kinds: cpu, cuda"),
        ("models: [{path: a, device: tpu}]", r"models\.0\.device"),
        ("queue_timeout_s: .nan", "queue_timeout_s"),
        ("unknown: 1", "unknown"),
        ("swap: {size_bytes: 1GiB}", r"swap\.path"),
        ("swap: {path: s, size: 1GiB}", r"swap\.size"),
        ("swap: {path: s, threads: 1}", r"swap\.threads"),
        ("swap: {path: s, deadline_s: 0}", r"swap\.deadline_s"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(write(tmp_path, text))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_are_valid(file: Path) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text()), json.loads(json_schema()))
    assert load_config(file).models


def test_the_schema_refuses_what_the_config_refuses() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"prot": 1}, json.loads(json_schema()))


def test_what_a_model_is_given_reaches_the_manager(tmp_path: Path) -> None:
    file = tmp_path / "mball.yaml"
    file.write_text("models: [{path: m, pinned: true, preload: true, priority: 2, keep_alive_s: 30}]")
    config = load_config(file)
    spec = model_spec(config.models[0], config)
    assert (spec.pinned, spec.preload, spec.priority, spec.keep_alive_s) == (True, True, 2, 30.0)


def test_the_swap_store_of_a_file_lies_beside_it(tmp_path: Path) -> None:
    swap = "{path: swap, size_bytes: 2GiB, slot_bytes: 1MiB, daily_write_bytes: 1TiB, threads: 4}"
    text = f"models: [{{path: m}}]\nswap: {swap}"
    file = tmp_path / "mball.yaml"
    file.write_text(text)
    found = swap_settings(load_config(file))
    assert found is not None
    assert (found.path, found.size_bytes, found.slot_bytes) == (tmp_path / "swap", 2 * GiB, MiB)
    assert (found.daily_write_bytes, found.threads, found.ephemeral, found.deadline_s) == (1024 * GiB, 4, False, 600.0)
    jsonschema.validate(yaml.safe_load(text), json.loads(json_schema()))
    file.write_text("models: [m]")
    assert swap_settings(load_config(file)) is None


def test_files_of_clients_lie_beside_the_config(tmp_path: Path) -> None:
    found = load_config(write(tmp_path, "files: {path: kept, max_bytes: 1GiB}")).files
    assert (found.path, found.max_bytes) == (tmp_path / "kept", 1 << 30)


def test_the_swap_store_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBALL_SWAP__PATH", "/nvme/swap")
    monkeypatch.setenv("MBALL_SWAP__SIZE_BYTES", "3GiB")
    found = swap_settings(load_config(write(tmp_path, "models: [m]")))
    assert found is not None
    assert (found.path, found.size_bytes) == (Path("/nvme/swap"), 3 * GiB)


def test_an_engine_of_its_own_interpreter(tmp_path: Path) -> None:
    text = """
        models:
          - {path: a, engine: vllm, engine_python: /v/bin/python, engine_args: {tensor-parallel-size: 2}}
          - {path: b, engine: vllm, max_num_batched_tokens: 4096, resident_layers: 12}
          - {path: c}
    """
    config = load_config(write(tmp_path, text))
    a, b, c = (model_spec(model, config).worker for model in config.models)
    assert (a.engine, a.engine_python, a.engine_args) == ("vllm", "/v/bin/python", {"tensor-parallel-size": 2})
    assert (b.engine_python, b.engine_args, b.resident_layers) == (None, {"max_num_batched_tokens": 4096}, 12)
    assert (c.engine, c.engine_args, c.starts_awake) == ("transformers", {}, False)
    assert a.starts_awake


def test_an_engines_environment(tmp_path: Path) -> None:
    text = """
        models:
          - {path: a, engine: vllm, engine_env: {VLLM_USE_DEEP_GEMM: 0, HF_TOKEN: secret}}
          - {path: b, engine: vllm, engine_env: {HF_TOKEN: secret, VLLM_USE_DEEP_GEMM: "0"}}
          - {path: c, engine: vllm, engine_env: {HF_TOKEN: other}}
          - {path: d, engine: vllm}
    """
    config = load_config(write(tmp_path, text))
    a, b, c, d = model_specs(config, tmp_path)
    assert a.environment.items() >= {"VLLM_USE_DEEP_GEMM": "0", "HF_TOKEN": "secret"}.items()
    assert set(a.environment) - {"VLLM_USE_DEEP_GEMM", "HF_TOKEN"} == set(d.environment) == {"PYTHONPATH"}
    assert a.worker.environment_digest == b.worker.environment_digest
    assert len({a.worker.environment_digest, c.worker.environment_digest, d.worker.environment_digest, ""}) == 3
    assert "secret" not in a.worker.to_json()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("engine_args: {seed: 1}", "engine: vllm"),
        ("engine_env: {A: b}", "engine: vllm"),
        ("engine: vllm, engine_env: {PYTHONPATH: /x}", "PYTHONPATH is set by MBALL"),
        ("engine: vllm, engine_env: {VLLM_SERVER_DEV_MODE: 0}", "VLLM_SERVER_DEV_MODE is set by MBALL"),
        ("engine: vllm, engine_env: {MBALL_RUN: x}", "MBALL_RUN is set by MBALL"),
        ("engine: vllm, engine_env: {A=B: x}", "'A=B' is no name"),
        ("engine: vllm, engine_env: {A: true}", "valid string"),
        ("engine_python: /v/bin/python", "engine: vllm"),
        ("engine: vllm, resident_experts: 3", "engine: transformers"),
        ("engine: vllm, resident_layers: 3, engine_args: {offload-group-size: 4}", "offload-group-size exclude"),
        ("engine: vllm, engine_args: {uds: /tmp/x}", "uds is set by MBALL"),
        ("engine: vllm, engine_args: {lora_modules: [7]}", "NAME=PATH"),
        ("engine: vllm, engine_args: {lora_modules: [a=/x]}", "two models are called 'a'"),
        ("engine: vllm, kv_arena_bytes: 1GiB, engine_args: {enable_lora: true}", "enable_lora"),
        ("engine: vllm, engine_args: {gpu-memory-utilization: 0.9}", "give the model's kv_cache_memory_bytes"),
    ],
)
def test_options_of_the_other_engine_are_refused(tmp_path: Path, options: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config(write(tmp_path, f"models: [{{path: a, {options}}}]"))
