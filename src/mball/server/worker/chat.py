"""A chat request as what the engine runs: its prompt in the model's chat template, its grammar, its tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mball.errors import InvalidRequest
from mball.server.engine.grammar import Grammar
from mball.server.tenants import salted
from mball.server.worker.answers import Answer
from mball.server.worker.call_syntax import KNOWN, CallSyntax, grammar_of, syntax_of
from mball.server.worker.calls import CallReader
from mball.server.worker.formats import Format
from mball.server.worker.generation import Job
from mball.server.worker.protocol import ChatRequest
from mball.server.worker.sampling import Wanted, sampling_params
from mball.server.worker.service import Service
from mball.server.worker.structured import Grammars


@dataclass(frozen=True, slots=True)
class Chat:
    """`prompt_tokens` of the one prompt that all jobs have. `syntax`: how calls of `tools` (names with the schemas of
    their arguments) are written, where any may be called."""

    jobs: list[Job]
    prompt_tokens: int
    syntax: CallSyntax | None
    tools: dict[str, dict[str, Any]]
    most_calls: int | None

    def reader(self) -> CallReader | None:
        return None if self.syntax is None else CallReader(self.syntax, self.tools, self.most_calls)

    def answer(self, service: Service, request: ChatRequest, form: Format) -> Answer:
        """Raises NotResident, Draining."""
        service.check_open()
        running = service.generation(self.jobs, request.stop)
        return Answer(running, form, prompt_tokens=self.prompt_tokens, stream=request.stream)


async def prepare(service: Service, request: ChatRequest, tenant: str, path: str) -> Chat:
    """Raises InvalidRequest, UnknownModel, Draining."""
    engine = service.generator(path)
    service.check_model(request.model)
    syntax = _syntax(service, request)
    prompt = await prompt_ids(service, request, path)
    wanted = Wanted(request.wanted_tokens, request.wanted_logprobs)
    params = sampling_params(request, wanted, len(prompt), engine, service.spec.max_logprobs, service.sampling_defaults)
    grammar = await _grammar(service, request, syntax)
    salt = salted(tenant, request.cache_salt)
    shown = syntax is not None
    jobs = [Job(prompt, sampling, salt, None if grammar is None else grammar.copy(), shown) for sampling in params]
    tools = {tool.name: json.loads(tool.parameters) for tool in request.usable}
    return Chat(jobs, len(prompt), syntax, tools, None if request.parallel_tool_calls else 1)


async def prompt_ids(service: Service, request: ChatRequest, path: str) -> list[int]:
    """Raises InvalidRequest."""
    limit = service.generator(path).max_model_len
    told = [tool.given for tool in request.tools] if request.usable else []
    return await service.in_text_thread(lambda: service.tokenizer.encode_chat(request.messages, limit, told))


def _syntax(service: Service, request: ChatRequest) -> CallSyntax | None:
    if not request.usable:
        return None
    syntax = syntax_of(service.tokenizer.chat_template)
    if syntax is None:
        raise InvalidRequest(
            f"`tools`: the model's chat template has none, or writes calls in a way not known here (known: {KNOWN})",
            param="tools",
            code="unsupported_parameter",
        )
    return syntax


async def _grammar(service: Service, request: ChatRequest, syntax: CallSyntax | None) -> Grammar | None:
    """What each choice is kept to: calls alone where one is forced, valid ones where a tool is strict."""
    schema = request.response_format
    if syntax is not None and (request.forced or schema is not None or any(tool.strict for tool in request.usable)):
        source = grammar_of(
            syntax,
            request.usable,
            service.tokenizer.special_id,
            forced=request.forced,
            parallel=request.parallel_tool_calls and request.tool_choice.name is None,
            otherwise=schema,
        )
        kept = [tool.parameters for tool in request.usable]

        def compiled(grammars: Grammars) -> Grammar:
            # That of tags has parts of the schemas alone.
            for schema in kept if syntax.form == "tagged" else []:
                grammars.of_schema(schema, "tools")
            return grammars.of_source(source, kept, "tools")

        return await service.grammar(compiled)
    if schema is None:
        return None
    return await service.grammar(lambda grammars: grammars.of_schema(schema, "response_format"))
