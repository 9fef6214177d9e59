"""The command line and the environment of vLLM's own server, from what the manager says of a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mball.errors import ConfigError
from mball.loader.vllm_names import CPU_WORKER, CUDA_EXTENSION, LOAD_FORMAT, SERVER, SLEEP_ENVIRONMENT
from mball.memory.spec import WorkerSpec

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


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that is not the operator's to give."""
    for name in engine_args:
        if (plain := name.replace("-", "_")) in OURS:
            raise ConfigError(f"engine_args: {name} is set by MBALL{_INSTEAD.get(plain, '')}")


def command(spec: WorkerSpec, kv_bytes: int) -> list[str]:
    """What starts the server in this interpreter. Options that are not given are vLLM's to choose."""
    return [sys.executable, "-m", SERVER, *arguments(spec, kv_bytes)]


def arguments(spec: WorkerSpec, kv_bytes: int) -> list[str]:
    """vLLM's options. Raises ConfigError."""
    check_engine_args(spec.engine_args)
    options: dict[str, Any] = {
        "model": spec.path,
        "served_model_name": spec.model,
        "load_format": LOAD_FORMAT,
        "max_num_seqs": spec.max_num_seqs,
        "max_model_len": spec.max_model_len,
        "dtype": spec.dtype,
        "trust_remote_code": spec.trust_remote_code or None,
        "enable_prefix_caching": None if spec.enable_prefix_caching else False,
        **{name.replace("-", "_"): value for name, value in spec.engine_args.items()},
        "uds": spec.socket_path,
        "kv_cache_memory_bytes": kv_bytes,
        "enable_sleep_mode": True,
    }
    if spec.device.startswith("cuda"):
        options["worker_extension_cls"] = CUDA_EXTENSION
    else:
        options["worker_cls"] = CPU_WORKER
    return [word for name, value in options.items() for word in _words(name, value)]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What the server's processes have beside what the manager gave."""
    return {
        **inherited,
        # /sleep, /wake_up and /collective_rpc: on the unix socket, which is this user's alone.
        "VLLM_SERVER_DEV_MODE": "1",
        SLEEP_ENVIRONMENT: "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "TRANSFORMERS_OFFLINE": "1",
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


_INSTEAD = {
    "kv_cache_memory_bytes": ": give it beside engine_args, as the model's own option",
    "gpu_memory_utilization": ", in bytes: give the model's kv_cache_memory_bytes",
    "served_model_name": ": give the model's name",
    "model": ": give the model's path",
}
