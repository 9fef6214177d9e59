"""The command line and the environment of vLLM's own server, from what the manager says of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mball.errors import ConfigError
from mball.loader.vllm_names import (
    CPU_WORKER,
    CUDA_EXTENSION,
    HOST_SPEC,
    KV_ENVIRONMENT,
    KV_IDENTITY_ENVIRONMENT,
    KV_TIER,
    LOAD_FORMAT,
    SLEEP_ENVIRONMENT,
    TENANT_MIDDLEWARE,
)
from mball.memory.spec import PARALLEL, WorkerSpec
from mball.memory.vllm_cold import Cold

OURS = frozenset(
    {
        "model",
        "served_model_name",
        "uds",
        "host",
        "port",
        "enable_sleep_mode",
        "sleep_mode_backend",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "worker_cls",
        "worker_extension_cls",
        "middleware",
        "root_path",
        "api_server_count",
        "headless",
    }
)
"""vLLM's options that MBALL sets, or that would let others in."""

_SET = {
    # /sleep, /wake_up and /collective_rpc: on the unix socket, which is this user's alone.
    "VLLM_SERVER_DEV_MODE": "1",
    SLEEP_ENVIRONMENT: "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
_OURS_OF_ENVIRONMENT = {*_SET, "CUDA_VISIBLE_DEVICES", "PYTHONPATH"}


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that is not the operator's to give."""
    for name, value in engine_args.items():
        if (plain := name.replace("-", "_")) in OURS:
            raise ConfigError(f"engine_args: {name} is set by MBALL{_INSTEAD.get(plain, '')}")
        if plain in PARALLEL and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"engine_args: {name} is {value!r}, not a number of GPUs")


def check_engine_env(engine_env: Mapping[str, str]) -> None:
    """Raises ConfigError for a variable that is not the operator's to give, or that is none."""
    for name, value in engine_env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ConfigError(f"engine_env: {name!r} is no name and value of an environment")
        if name in _OURS_OF_ENVIRONMENT or name.startswith("MBALL_"):
            raise ConfigError(f"engine_env: {name} is set by MBALL")


def adapters(engine_args: Mapping[str, Any]) -> list[str]:
    """Names of the LoRA adapters that vLLM is to serve beside a model. Raises ConfigError where none can be told."""
    given = [value for name, value in engine_args.items() if name.replace("-", "_") == "lora_modules"]
    modules = [each for value in given for each in (value if isinstance(value, list | tuple) else [value])]
    return [_adapter(module) for module in modules if module is not None]


def _adapter(module: Any) -> str:
    if isinstance(module, str) and module.lstrip().startswith("{"):
        try:
            module = json.loads(module)
        except ValueError:
            module = None
    name = module.partition("=")[0] if isinstance(module, str) else None
    if isinstance(module, Mapping):
        name = module.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ConfigError("engine_args: each of lora_modules is NAME=PATH, or a mapping with name and path")
    return name


def check_kv(kv_arena_bytes: int | None, engine_args: Mapping[str, Any]) -> None:
    """Raises ConfigError where KV blocks are to be kept and can't be told apart, or are kept by another already."""
    if not kv_arena_bytes:
        return
    given = {name.replace("-", "_"): value for name, value in engine_args.items()}
    if "kv_transfer_config" in given:
        raise ConfigError("kv_arena_bytes and engine_args: kv_transfer_config exclude each other: leave one out")
    if given.get("enable_lora"):
        raise ConfigError(
            "kv_arena_bytes: with engine_args: enable_lora no KV is kept, as an adapter's name does not say what is in "
            "it: leave one of them out"
        )
    if (name := given.get("prefix_caching_hash_algo", _HASH)) not in _HASHES:
        raise ConfigError(f"kv_arena_bytes: prefix_caching_hash_algo is {name}, which others can make collide: {_HASH}")


def offloads(engine_args: Mapping[str, Any]) -> list[str]:
    """Options of its own by which vLLM is told to keep weights in host memory."""
    return [name for name, value in engine_args.items() if name.replace("-", "_") in _OFFLOADING and value]


def check_cold(spec: WorkerSpec) -> None:
    """Raises ConfigError where layers are to be in host memory and can't be."""
    if spec.resident_layers is None:
        return
    if not spec.device.startswith("cuda"):
        raise ConfigError(
            f"{spec.model}: resident_layers: vLLM has layers in host memory for a GPU alone: leave it out"
        )
    if spec.ranks > 1:
        raise ConfigError(
            f"{spec.model}: resident_layers: on {spec.ranks} GPUs all its layers stay there: leave it out"
        )
    if given := offloads(spec.engine_args):
        raise ConfigError(f"resident_layers and engine_args: {', '.join(given)} exclude each other: leave one out")


def capture_size(spec: WorkerSpec) -> int | None:
    """The largest batch that vLLM is to capture a graph of: twice what was asked at once lately, as a power of two, and
    not so few that a busier day would suffer for it. None where it is vLLM's to choose, or would be as large."""
    if not spec.busy_requests or not spec.device.startswith("cuda") or spec.engine_options.keys() & _CAPTURING:
        return None
    wanted = 1 << (2 * spec.busy_requests - 1).bit_length()
    size = max(_LEAST_CAPTURED, wanted)
    return size if size < min(2 * spec.max_num_seqs, _MOST_CAPTURED) else None


def keeps_kv(spec: WorkerSpec) -> bool:
    """Whether its KV blocks go to host memory, and to the swap store where there is one."""
    caching = spec.enable_prefix_caching and spec.engine_args.get("enable_prefix_caching", True)
    return bool(spec.kv_arena_bytes) and spec.task == "generate" and bool(caching)


def kv_socket(spec: WorkerSpec) -> Path:
    """Where its engine asks for the swap store: in the worker's own folder."""
    return Path(spec.socket_path).with_suffix(".kv")


def engine_id(spec: WorkerSpec) -> str:
    """One that no other engine has."""
    return f"mball-{hashlib.sha256(spec.socket_path.encode()).hexdigest()[:16]}"


def arguments(spec: WorkerSpec, kv_bytes: int, cold: Cold | None = None) -> list[str]:
    """vLLM's options; those that are not given are its own to choose. `cold`: its layers in host memory. Raises
    ConfigError."""
    check_engine_args(spec.engine_args)
    check_kv(spec.kv_arena_bytes, spec.engine_args)
    check_cold(spec)
    options: dict[str, Any] = {
        "model": spec.path,
        "served_model_name": spec.model,
        "load_format": LOAD_FORMAT,
        "max_num_seqs": spec.max_num_seqs,
        "max_cudagraph_capture_size": capture_size(spec),
        # By itself vLLM does not start where KV has no room for a sequence as long as the model's longest.
        "max_model_len": spec.max_model_len or ("auto" if spec.task == "generate" else None),
        "dtype": spec.dtype,
        "trust_remote_code": spec.trust_remote_code or None,
        "enable_prefix_caching": None if spec.enable_prefix_caching else False,
        **spec.engine_options,
        "uds": spec.socket_path,
        "kv_cache_memory_bytes": kv_bytes,
        "enable_sleep_mode": True,
        "middleware": TENANT_MIDDLEWARE,
    }
    if spec.device.startswith("cuda"):
        options["worker_extension_cls"] = CUDA_EXTENSION
        # Or it would not start beside others, whatever room there is: by itself it wants 0.92 of the device free.
        options["gpu_memory_utilization"] = _LEAST_SHARE
    else:
        options["worker_cls"] = CPU_WORKER
    if cold is not None:
        options |= {"offload_backend": "prefetch", **cold.options()}
    if keeps_kv(spec):
        # What of a prompt was not computed is told in `usage`, as the embedded engine tells it.
        told = {"prefix_caching_hash_algo": _HASH, "enable_prompt_tokens_details": True}
        options = {**told, **options, "kv_transfer_config": _kv_transfer(spec)}
    return [word for name, value in options.items() for word in _words(name, value)]


def _kv_transfer(spec: WorkerSpec) -> dict[str, Any]:
    """Blocks go to host memory first, as vLLM does it; below it there is MBALL's tier."""
    tiers: dict[str, Any] = {"spec_name": "TieringOffloadingSpec"}
    if not spec.device.startswith("cuda"):
        tiers = {"spec_name": HOST_SPEC[0], "spec_module_path": HOST_SPEC[1]}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "engine_id": engine_id(spec),
        # What could not be brought back is computed, and no request fails for it.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            **tiers,
            "cpu_bytes_to_use": spec.kv_arena_bytes,
            "secondary_tiers": [{"type": KV_TIER}],
        },
    }


def environment(inherited: Mapping[str, str], kv_socket: Path | None = None, kv_identity: str = "") -> dict[str, str]:
    """What the server's processes have beside what the manager gave. `kv_socket`: where the swap store is asked for;
    `kv_identity`: SHA-256 of what KV is computed with."""
    return {
        **inherited,
        **_SET,
        **({} if kv_socket is None else {KV_ENVIRONMENT: str(kv_socket), KV_IDENTITY_ENVIRONMENT: kv_identity}),
    }


def _words(name: str, value: Any) -> Iterator[str]:
    """One option as vLLM's command line takes it."""
    option = "--" + name.replace("_", "-")
    match value:
        case None:
            return
        case True:
            yield option
        case False:
            yield "--no-" + name.replace("_", "-")
        case Mapping():
            yield from (option, json.dumps(dict(value)))
        case list() | tuple():
            yield option
            yield from (json.dumps(each) if isinstance(each, Mapping) else str(each) for each in value)
        case _:
            yield from (option, str(value))


_LEAST_CAPTURED = 32
_MOST_CAPTURED = 512
"""vLLM's own bound; by itself it takes twice `max_num_seqs`."""

_CAPTURING = frozenset(
    {
        "compilation_config",
        "cudagraph_capture_sizes",
        "enforce_eager",
        "max_cudagraph_capture_size",
        "max_num_seqs",
        "optimization_level",
        "performance_mode",
        "speculative_config",
    }
)
"""With one of these the operator, or what decodes several tokens at once, says what is captured."""

_OFFLOADING = frozenset({"offload_backend", "offload_group_size", "cpu_offload_gb"})

_HASH = "sha256_cbor"
_HASHES = ("sha256", "sha256_cbor")
"""Block names: those of `sha256` are of Python's pickles."""

_LEAST_SHARE = 0.01
"""Of a device, which has to be free for vLLM to start. How much it takes is said in bytes, and promised before."""

_INSTEAD = {
    "kv_cache_memory_bytes": ": give it beside engine_args, as the model's own option",
    "gpu_memory_utilization": ", in bytes: give the model's kv_cache_memory_bytes",
    "served_model_name": ": give the model's name",
    "model": ": give the model's path",
}
