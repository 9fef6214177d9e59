"""From the configuration to what the manager serves."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mball.device.device import Device, members, open_devices
from mball.device.host import memory_bytes
from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from mball.memory.pressure_watch import Gauge
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec, Task, WorkerSpec
from mball.server.config import Config, ModelConfig
from mball.server.engine_path import search_path
from mball.swap.store import Settings as SwapSettings
from mball.units import GiB, MiB

_CPU_BYTES = 2 * GiB
_DRAM_BYTES = 4 * GiB
_LEAST_RESERVE = 512 * MiB
_POOLING = "1_Pooling/config.json"
_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "nomic_bert", "modernbert"})


def build_manager(config: Config, runtime_dir: Path, *, gauge: Gauge | None = None) -> Manager:
    """The manager that the configuration describes, not started. `gauge` tells of the host's memory (None: the kernel).

    A model whose folder is defective is served all the same: asking for it gives the reason.
    """
    for name in (part for device in config.device for part in members(device)):
        kind, _, state = name.partition(":")
        if kind == "simulated" and not Path(state).exists():
            SimulatedDevice.create(state, config.device_memory_bytes or _CPU_BYTES)
    return Manager(
        model_specs(config, runtime_dir),
        [(device, config.device_memory_bytes or budget(device)) for device in open_devices(config.device)],
        dram_bytes=dram_budget(config),
        runtime_dir=runtime_dir,
        state_dir=config.state_dir or state_dir(),
        log_dir=config.log_dir or runtime_dir / "logs",
        command_for=_command,
        zygote_for=_zygote,
        settings=settings(config),
        swap=swap_settings(config),
        gauge=gauge,
    )


def model_specs(config: Config, runtime_dir: Path) -> list[ModelSpec]:
    """Blocks. Raises DeviceError, ConfigError for a device that is not there."""
    specs = [model_spec(model, config) for model in config.models]
    if any(spec.worker.engine == "vllm" for spec in specs):
        path = search_path(runtime_dir / "vllm")
        specs = [
            replace(s, environment={**s.environment, "PYTHONPATH": path}) if s.worker.engine == "vllm" else s
            for s in specs
        ]
    return specs


def budget(device: Device) -> int:
    """What models may hold of a device where nobody says. Of a GPU something is left to the driver and to others, of
    the CPU's memory (or what a cgroup allows of it) half to processes and images."""
    if not device.name.startswith("cuda:"):
        return min(_CPU_BYTES, memory_bytes() // 2)
    return device.total_bytes - max(device.total_bytes // 32, _LEAST_RESERVE)


def dram_budget(config: Config) -> int:
    """What is configured; else half of the host's memory beside a GPU, whose models are large and take none of it while
    they are there. Images give way where others need it."""
    if config.dram_bytes is not None:
        return config.dram_bytes
    return memory_bytes() // 2 if any(name.startswith("cuda") for name in config.device) else _DRAM_BYTES


def settings(config: Config) -> Settings:
    return Settings(
        max_queue=config.max_queue,
        queue_timeout_s=config.queue_timeout_s,
        max_wait_s=config.max_wait_s,
        swap_time_share=config.swap_time_share,
        start_s=config.start_timeout_s,
        zygote=config.zygote,
        host_reserve_bytes=config.host_reserve_bytes,
        swap_weights="auto" if config.swap is None else config.swap.weights,
    )


def swap_settings(config: Config) -> SwapSettings | None:
    swap = config.swap
    if swap is None:
        return None
    return SwapSettings(
        swap.path.expanduser().absolute(),
        size_bytes=swap.size_bytes,
        slot_bytes=swap.slot_bytes,
        daily_write_bytes=swap.daily_write_bytes,
        ephemeral=swap.ephemeral,
        threads=swap.threads,
        deadline_s=swap.deadline_s,
    )


def state_dir() -> Path | None:
    """Where this user's programs keep what they learn; None for one without a home."""
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "mball"
    try:
        return Path.home() / ".local" / "state" / "mball"
    except RuntimeError:
        return None


def model_spec(model: ModelConfig, config: Config) -> ModelSpec:
    worker = WorkerSpec(
        model=model.name,
        path=str(model.path.expanduser().absolute()),
        task=task_of(model.path) if model.task == "auto" else model.task,
        dtype=None if model.dtype == "auto" else model.dtype,
        max_model_len=model.max_model_len,
        max_num_seqs=model.max_num_seqs,
        max_num_batched_tokens=model.max_num_batched_tokens,
        kv_cache_bytes=model.kv_cache_memory_bytes,
        threads=config.threads,
        trust_remote_code=model.trust_remote_code,
        enable_prefix_caching=model.enable_prefix_caching,
        kv_arena_bytes=model.kv_arena_bytes,
        resident_layers=model.resident_layers,
        resident_experts=model.resident_experts,
        engine=model.engine,
        engine_python=str(model.engine_python.expanduser()) if model.engine_python is not None else None,
        engine_args=_engine_args(model),
        environment_digest=_digest(model.engine_env) if model.engine_env else "",
    )
    return ModelSpec(
        worker,
        pinned=model.pinned,
        preload=model.preload,
        priority=model.priority,
        keep_alive_s=model.keep_alive_s,
        max_queue=model.max_queue,
        devices=tuple(device.name for device in open_devices(model.device)),
        environment=model.engine_env,
    )


def task_of(path: Path) -> Task:
    """`embed` for an encoder or a sentence-transformers folder, by its files; else `generate`."""
    if (path / _POOLING).is_file():
        return "embed"
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return "generate"
    return "embed" if isinstance(config, dict) and config.get("model_type") in _ENCODERS else "generate"


def _engine_args(model: ModelConfig) -> dict[str, Any]:
    """A default that is right for the embedded engine is not for another."""
    if model.engine == "vllm" and "max_num_batched_tokens" in model.model_fields_set:
        return {"max_num_batched_tokens": model.max_num_batched_tokens, **model.engine_args}
    return model.engine_args


def _digest(environment: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()


def _command(spec: ModelSpec) -> list[str]:
    if spec.worker.engine == "vllm":
        return [spec.worker.engine_python or sys.executable, "-m", "mball.server.worker.vllm_process"]
    return [sys.executable, "-m", "mball.server.worker"]


def _zygote(spec: ModelSpec) -> list[str]:
    if spec.worker.engine == "vllm":
        return [spec.worker.engine_python or sys.executable, "-m", "mball.server.worker.vllm_zygote"]
    return [sys.executable, "-m", "mball.server.worker.zygote"]
