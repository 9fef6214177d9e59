"""OpenAI's requests, strictly: what is asked for is done or refused by name, never dropped in silence."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mball.errors import InvalidRequest
from mball.server.worker.messages import ChatMessage, read_messages
from mball.server.worker.schemas import read_response_format
from mball.server.worker.tools import Tool, ToolChoice, read_tool_choice, read_tools
from mball.server.worker.values import encodable

MAX_CHOICES = 128
"""Choices of one request, over all its prompts."""
MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
MAX_SALT_LENGTH = 1024
MAX_INPUTS = 2048
"""Texts of one embeddings request (OpenAI's own limit)."""

_IGNORED = {
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "priority",
}
"""Accepted and without effect: they say nothing about the answer."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "dimensions": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default", "standard_only"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Not supported here: the values, beside null, that ask for nothing."""

TokenIds = list[int]
_R = TypeVar("_R", bound="Request")


class Request(BaseModel):
    """What every request has. A field that is null counts as not given."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, data: dict[str, Any]) -> dict[str, Any]:
        fields = {}
        for name, value in data.items():
            if value is None or name in _IGNORED:
                continue
            if name in _NEUTRAL and name not in cls.model_fields:
                if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[name]):
                    raise InvalidRequest(f"`{name}` is not supported here", param=name, code="unsupported_parameter")
                continue
            fields[name] = value
        return fields


class StreamOptions(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    BeforeValidator(_one_or_many),
    Field(max_length=MAX_STOPS),
]
Salt = Annotated[
    str, Field(min_length=1, max_length=MAX_SALT_LENGTH), AfterValidator(lambda salt: encodable(salt, "cache_salt"))
]
Real = Annotated[float, Field(allow_inf_nan=False)]


class SamplingRequest(Request):
    """How tokens are drawn: OpenAI's fields, and vLLM's `top_k`, `min_tokens`, `stop_token_ids`, `ignore_eos`; and
    vLLM's `cache_salt`: requests share KV only with those of the same."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Real = Field(default=1.0, ge=0, le=2)
    top_p: Real = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stops = []
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    logit_bias: Annotated[dict[str, Annotated[Real, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)] = {}
    presence_penalty: Real = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Real = Field(default=0.0, ge=-2, le=2)
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: list[int] = Field(default=[], max_length=128)
    ignore_eos: bool = False
    cache_salt: Salt | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` needs `stream`", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(SamplingRequest):
    """`response_format` is the JSON text of the schema that is asked for."""

    messages: Annotated[list[ChatMessage], BeforeValidator(read_messages)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0)
    response_format: Annotated[str | None, BeforeValidator(read_response_format)] = None
    tools: Annotated[list[Tool], BeforeValidator(read_tools)] = []
    tool_choice: Annotated[ToolChoice, BeforeValidator(read_tool_choice)] = ToolChoice("auto")
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs`: true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ; give one", param="max_tokens")
        names = {tool.name for tool in self.tools}
        if self.tool_choice.mode == "required" and not (
            names & {self.tool_choice.name} if self.tool_choice.name else names
        ):
            raise InvalidRequest("`tool_choice` asks for a tool that is not in `tools`", param="tool_choice")
        if self.response_format is not None or self.forced:
            for name in ("ignore_eos", "min_tokens"):
                if getattr(self, name):
                    raise InvalidRequest(f"`{name}`: JSON of a schema ends where it ends", param=name)
        return self

    @property
    def usable(self) -> list[Tool]:
        """The tools that may be called."""
        if self.tool_choice.mode == "none":
            return []
        return [tool for tool in self.tools if self.tool_choice.name in (None, tool.name)]

    @property
    def forced(self) -> bool:
        """A tool must be called."""
        return self.tool_choice.mode == "required"

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    prompt: Annotated[list[str | TokenIds], BeforeValidator(lambda value: read_inputs(value, MAX_CHOICES, "prompt"))]
    logprobs: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _few_choices(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise InvalidRequest(f"prompts × `n` is {len(self.prompt) * self.n}, over {MAX_CHOICES}", param="n")
        return self


class EmbeddingRequest(Request):
    input: Annotated[list[str | TokenIds], BeforeValidator(lambda value: read_inputs(value, MAX_INPUTS, "input"))]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)


def read_inputs(value: Any, most: int, name: str) -> list[str | TokenIds]:
    """Texts or token ids from a text, a list of texts, token ids, or a list of token ids. Raises InvalidRequest."""
    if isinstance(value, str):
        return [encodable(value, name)]
    if _is_token_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"`{name}` must be a text, texts, token ids, or lists of token ids", param=name)
    if len(value) > most:
        raise InvalidRequest(f"`{name}` has {len(value)} entries, over {most}", param=name)
    kind = str if isinstance(value[0], str) else list
    if not all(isinstance(entry, kind) and (kind is str or _is_token_ids(entry)) for entry in value):
        raise InvalidRequest(f"`{name}` must hold texts alone, or non-empty lists of token ids alone", param=name)
    return [encodable(entry, f"{name}[{index}]") if kind is str else entry for index, entry in enumerate(value)]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(entry) is int and entry >= 0 for entry in value)


def parse(kind: type[_R], fields: dict[str, Any]) -> _R:
    """The request. Raises InvalidRequest naming the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(f"Unrecognized request argument supplied: {param}", param=param) from None
        raise InvalidRequest(f"`{param}`: {first['msg']}", param=param) from None
