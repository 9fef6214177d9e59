"""The configuration: YAML < `MBALL_` environment < command-line flags; the later wins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from mball.errors import ConfigError
from mball.memory.vllm_options import adapters, check_engine_args, check_engine_env, check_kv, offloads
from mball.swap.layout import SLOT_BYTES
from mball.units import GiB, MiB, parse_bytes

_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}], "examples": ["1.5GiB", "512MiB"]}
ConfigSize = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema(_SIZE_SCHEMA)]


def _split(names: Any) -> Any:
    """A name, several with commas between them, or a list."""
    return re.split(r",(?=cpu\b|cuda\b|simulated:)", names) if isinstance(names, str) else names


_DEVICE = r"^(cpu|cuda(:.+)?|simulated:.+)$"
_DEVICE_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string", "pattern": _DEVICE}}],
    "examples": ["cuda", ["cuda:0", "cuda:1"]],
}
DeviceNames = Annotated[
    tuple[Annotated[str, Field(pattern=_DEVICE)], ...],
    NoDecode,
    BeforeValidator(_split),
    WithJsonSchema(_DEVICE_SCHEMA),
]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ModelConfig(BaseModel):
    """One model. Engine options carry vLLM's names."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="A folder with config.json and safetensors.")
    name: str = Field(default="", pattern=r"^[^\s/][^\s]*$|^$", description="The name clients use; the folder's name.")
    engine: Literal["transformers", "vllm"] = "transformers"
    engine_python: Path | None = Field(
        default=None, description="An interpreter that has the engine, for vllm: by default MBALL's own."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Options of the engine by its own names, for vllm: {tensor_parallel_size: 2}."
    )
    engine_env: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        default_factory=dict,
        description="Environment variables of the engine, for vllm: {VLLM_LOGGING_LEVEL: DEBUG}. It is started afresh "
        "then, not forked, which takes longer: many are read while modules are imported.",
    )
    task: Literal["auto", "generate", "embed"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of context; the model's own by default, with vllm as far as KV has room.",
    )
    max_num_seqs: int = Field(default=8, ge=1, le=1024, description="Sequences in one batch.")
    max_num_batched_tokens: int = Field(default=512, ge=1, description="Tokens in one step of the engine.")
    kv_cache_memory_bytes: ConfigSize | None = Field(
        default=None, description="Size of the KV pool, of each GPU where it is on several; by default chosen."
    )
    enable_prefix_caching: bool = Field(
        default=True,
        description="Keep the KV of prompts that others may begin alike. What is kept is not computed again, so the "
        "rest is computed in other pieces: in bf16 an answer may differ in its rounding from one that was asked cold.",
    )
    kv_arena_bytes: ConfigSize | None = Field(
        default=None,
        description="Host memory for KV that leaves the pool; by default modest on a GPU, none for vllm or on the CPU.",
    )
    resident_layers: Literal["auto"] | Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Layers that stay on the device while the others are streamed through it: a number, or auto for as "
        "many as fit; by default all, and auto for a model that can never fit whole. With vllm the others are in its "
        "own host memory, as long as its process lives, and on a GPU alone.",
    )
    resident_experts: Literal["auto"] | Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="The same for the experts of a mixture, counted over all layers: all else stays on the device, and "
        "of the experts those that are chosen most.",
    )
    pinned: bool = Field(default=False, description="Once on the device, never demoted.")
    preload: bool = Field(default=False, description="Bring it in at start, before the first request.")
    priority: int = Field(
        default=0, description="The higher is served first, and leaves for a lower one only once that is overdue."
    )
    max_queue: int | None = Field(
        default=None, ge=1, description="Requests that may wait for it; by default as many as may wait in all."
    )
    device: DeviceNames = Field(
        default=(), description="Serve it there alone; by default on any of the server's devices, as there is room."
    )
    keep_alive_s: Seconds | None = Field(
        default=None, description="Leaves the device after so long without a request; by default only to make room."
    )
    trust_remote_code: bool = Field(default=False, description="Allow Python code in the model's folder.")

    @model_validator(mode="after")
    def _streamed_one_way(self) -> Self:
        if self.resident_layers is not None and self.resident_experts is not None:
            raise ValueError("resident_layers and resident_experts exclude each other: leave one of them out")
        return self

    @model_validator(mode="after")
    def _options_are_of_its_engine(self) -> Self:
        if self.engine == "transformers" and (self.engine_args or self.engine_env or self.engine_python):
            raise ValueError("engine_python, engine_args and engine_env are for engine: vllm")
        if self.engine == "vllm":
            if self.resident_experts is not None:
                raise ValueError("resident_experts are for engine: transformers; vllm has resident_layers")
            if self.resident_layers is not None and (given := offloads(self.engine_args)):
                raise ValueError(f"resident_layers and engine_args: {', '.join(given)} exclude each other")
            try:
                check_engine_args(self.engine_args)
                check_engine_env(self.engine_env)
                check_kv(self.kv_arena_bytes, self.engine_args)
                adapters(self.engine_args)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    @model_validator(mode="before")
    @classmethod
    def _name_from_path(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"path": data}
        if isinstance(data, Mapping) and data.get("path") and not data.get("name"):
            data = {**data, "name": Path(str(data["path"])).expanduser().absolute().name}
        return data


class LimitsConfig(BaseModel):
    """What one key may ask for."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    max_in_flight: int | None = Field(default=None, ge=1, description="Requests at once, those that wait too.")
    requests_per_minute: int | None = Field(default=None, ge=1, description="Requests begun within a minute.")
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Tokens of prompts and answers within a minute, counted as each answer ends."
    )
    priority: int = Field(
        default=0,
        description="The lowest `priority` that its requests may name, as the lowest goes first, and what those have "
        "at least that name none.",
    )


class KeyConfig(BaseModel):
    """A key that clients send; `mball keys new NAME` makes one."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="Whose it is; it stands in logs.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the key, which itself is written nowhere.")
    admin: bool = Field(default=False, description="May move models and see the state: `/mball/…`.")
    models: tuple[str, ...] = Field(default=(), description="For these models alone; by default for all.")
    limits: LimitsConfig = LimitsConfig()


class TlsConfig(BaseModel):
    """HTTPS, and nothing else, on the server's address. PEM files, read anew at each reload."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    certfile: Path = Field(description="The certificate, and behind it those that sign it.")
    keyfile: Path = Field(description="Its private key, without a password; for the server's user to read alone.")


class AdminConfig(BaseModel):
    """An address of its own for what an operator needs."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535, description="Another than the server's; 0 takes a free one.")


class SwapConfig(BaseModel):
    """A store on a disk for weights and KV that leave memory."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(
        description="A file, made where it is not, or a block device that holds nothing; if ephemeral, its folder."
    )
    size_bytes: ConfigSize | None = Field(
        default=None,
        description="What it may take of the disk in all, taken at once; without it the store has to be there "
        "(`mball swap init`). Another size makes it anew, empty.",
    )
    slot_bytes: ConfigSize = Field(default=SLOT_BYTES, description="A slot, a multiple of 4 KiB.")
    daily_write_bytes: ConfigSize | None = Field(
        default=None, description="The most that is written to it in a day (UTC): an SSD wears out."
    )
    ephemeral: bool = Field(default=False, description="It has no name and nothing of it outlives the server.")
    weights: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether images that leave DRAM are written to it: auto where the model's files are read slower.",
    )
    threads: int = Field(default=8, ge=2, le=256, description="Threads that read and write it.")
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=600.0, description="How long the disk may take for one transfer, until it is held to hang."
    )


class FilesConfig(BaseModel):
    """What `/v1/files` and `/v1/batches` keep on a disk. The bounds are those of one API key."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    path: Path | None = Field(default=None, description="A folder for one server alone; `files` in state_dir.")
    max_file_bytes: ConfigSize = Field(default=200 * MiB, description="The largest file that is taken.")
    max_bytes: ConfigSize = Field(default=4 * GiB, description="Of files in all, those of answers too.")
    max_files: int = Field(default=1000, ge=1, description="Files in all.")
    max_batches: int = Field(default=100, ge=1, description="Batches in all; the oldest that ended gives way.")
    max_requests: int = Field(default=50_000, ge=1, description="Requests in a batch.")
    concurrency: int = Field(default=8, ge=1, description="Requests of batches at once, of all keys together.")


class Config(BaseSettings):
    """What `mball serve` runs with."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="MBALL_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    models: list[ModelConfig] = Field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    device: DeviceNames = Field(
        default=("cpu",),
        description=(
            "One or several: cpu, cuda (every GPU, or those of CUDA_VISIBLE_DEVICES), cuda:INDEX, cuda:GPU-uuid, "
            "cuda:MIG-uuid, or simulated:PATH (a pretended GPU whose state is the file at PATH). cuda:0+cuda:1 is one "
            "device of two GPUs, for models of that tensor_parallel_size."
        ),
    )
    device_memory_bytes: ConfigSize | None = Field(
        default=None,
        description=(
            "What models may hold of each device together, and of each GPU of one that has several: weights, KV and "
            "working memory; by default 2 GiB of a CPU (half of its memory where that is less), and of a GPU all but a "
            "thirty-second (512 MiB at least), which is left to the driver and to others."
        ),
    )
    dram_bytes: ConfigSize | None = Field(
        default=None,
        description="DRAM for images of models that are not on the device, and for layers and KV that workers keep "
        "there: images have what those leave. By default half of the host's memory beside a GPU, else 4 GiB.",
    )
    swap: SwapConfig | None = Field(
        default=None, description="A store on a disk for weights and KV that leave memory; by default none."
    )
    host_reserve_bytes: ConfigSize | None = Field(
        default=None, description="Host memory that images leave to others; by default a twentieth, at most 4 GiB."
    )
    threads: int = Field(
        default=2, ge=1, description="Compute threads per worker on the CPU, where no other computes beside it."
    )
    api_keys: tuple[KeyConfig, ...] = Field(
        default=(), description="Who may ask; without any whoever reaches the address may, and move models too."
    )
    admin: AdminConfig | None = Field(
        default=None,
        description="Where `/mball/…`, `/metrics` and all else answers; the server's own address lacks those two then.",
    )
    tls: TlsConfig | None = Field(default=None, description="HTTPS in place of HTTP.")
    files: FilesConfig = FilesConfig()
    max_body_bytes: ConfigSize = Field(default=16 * MiB, description="The largest request body.")
    max_queue: int = Field(default=1024, ge=1, description="Requests that may wait for their models, in all.")
    queue_timeout_s: Seconds = Field(default=600.0, description="How long a request may wait for its model.")
    request_timeout_s: Seconds = Field(default=3600.0, description="How long a request may take in all.")
    sse_keepalive_s: Seconds | None = Field(
        default=15.0,
        description="How often a stream that waits for its model gets a comment, so that nobody between gives it up; "
        "from the first one on errors are events. null: never.",
    )
    log_requests: bool = Field(default=True, description="A line of the log for each request that reached its model.")
    traces: bool = Field(
        default=False,
        description="A span for each request by OTLP (extra otel); OTEL_EXPORTER_OTLP_ENDPOINT and its like say where.",
    )
    start_timeout_s: Seconds = Field(default=300.0, description="How long a worker may take to start.")
    zygote: bool = Field(
        default=True, description="Fork workers from a process that has done their imports: seconds less a start."
    )
    reload_on_change: bool = Field(
        default=True, description="Take a new configuration as soon as its file is written; SIGHUP does so in any case."
    )
    drain_timeout_s: Seconds = Field(default=30.0, description="How long a shutdown waits for requests under way.")
    max_wait_s: Seconds = Field(
        default=15.0, description="A request older than this may end another model's stay on the device."
    )
    swap_time_share: float = Field(
        default=0.2, gt=0, le=1, description="A stay is long enough that swapping takes at most this share of time."
    )
    runtime_dir: Path | None = Field(default=None, description="Sockets; a private temporary folder by default.")
    state_dir: Path | None = Field(
        default=None, description="What was measured, kept across restarts; XDG_STATE_HOME/mball by default."
    )
    log_dir: Path | None = Field(default=None, description="One log per model; inside runtime_dir by default.")

    file_values: ClassVar[dict[str, Any]] = {}

    @model_validator(mode="after")
    def _devices_are_of_one_kind(self) -> Config:
        kinds = {name.partition(":")[0] for name in self.device}
        if len(kinds) != 1:
            what = "no device is named" if not kinds else f"devices of several kinds: {', '.join(sorted(kinds))}"
            raise ValueError(f"{what}; name some of one kind")
        return self

    @model_validator(mode="after")
    def _addresses_differ(self) -> Config:
        if self.admin is not None and self.admin.port and self.admin.port == self.port:
            raise ValueError(f"port {self.port} is the server's own: give `admin` another")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        seen: set[str] = set()
        for model in self.models:
            for name in (model.name, *adapters(model.engine_args)):
                if name in seen:
                    raise ValueError(f"two models are called {name!r}: give one of them another name")
                seen.add(name)
        for key in self.api_keys:
            if strange := set(key.models) - seen:
                raise ValueError(f"the key {key.name!r} is for {', '.join(sorted(strange))}: no model is called so")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=cls.file_values))


def load_config(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """The configuration from a YAML file, the environment and flags (None means not given).

    Relative paths of models, the swap store, files and TLS in the file are taken from the file's folder. Raises
    ConfigError.
    """
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    source: type[Config] = type("Config", (Config,), {"file_values": _read_yaml(file) if file else {}, "__doc__": ""})
    try:
        return source(**given)
    except (ValidationError, SettingsError) as error:
        raise ConfigError(f"{file or 'configuration'}: {_reasons(error)}") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such config file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a mapping of settings is wanted, not a {type(values).__name__}")
    if isinstance(models := values.get("models"), list):
        named = [{"path": model} if isinstance(model, str) else model for model in models]
        values["models"] = [_beside(file.parent, model, "path") for model in named]
    for name, fields in (("swap", ("path",)), ("files", ("path",)), ("tls", ("certfile", "keyfile"))):
        if name in values:
            values[name] = _beside(file.parent, values[name], *fields)
    return values


def _beside(folder: Path, section: Any, *fields: str) -> Any:
    """Its paths are taken from the folder."""
    if not isinstance(section, dict):
        return section
    paths = {name: value for name in fields if isinstance(value := section.get(name), str)}
    return {**section, **{name: str(folder / Path(path).expanduser()) for name, path in paths.items()}}


def _reasons(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, part['loc'])) or 'config'}: {part['msg']}" for part in error.errors())


def json_schema() -> str:
    """The JSON schema of the YAML file."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2) + "\n"
