"""The worker's routes: OpenAI's, Anthropic's messages, tokens, and /health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mball.errors import InvalidRequest, MballError
from mball.server import http, tenants
from mball.server.tenants import salted
from mball.server.worker import anthropic_format, responses_format, responses_request
from mball.server.worker.answers import Answer
from mball.server.worker.anthropic_request import CountRequest, MessagesRequest, chat_request
from mball.server.worker.chat import prepare, prompt_ids
from mball.server.worker.embeddings import answer_embeddings
from mball.server.worker.formats import ChatFormat, CompletionFormat
from mball.server.worker.generation import Job
from mball.server.worker.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, parse
from mball.server.worker.responses_request import ResponsesRequest
from mball.server.worker.sampling import Wanted, sampling_params
from mball.server.worker.service import Service
from mball.server.worker.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from mball.units import MiB

MAX_BODY_BYTES = 64 * MiB
"""The gateway's own limit is lower and configurable; this one bounds the worker alone."""
BODY_TIMEOUT_S = 60.0

_log = structlog.get_logger(__name__)
_Handler = Callable[[Service, bytes, str], Awaitable[Response]]
"""Of a request's body and its tenant."""


def create_app(service: Service) -> Starlette:
    """The worker's HTTP side over one service."""
    app = Starlette(
        routes=[
            _post("/v1/chat/completions", service, _chat),
            _post("/v1/completions", service, _completions),
            _post("/v1/embeddings", service, _embeddings),
            _post(responses_format.PATH, service, _responses),
            _post(anthropic_format.PATH, service, _messages),
            _post(f"{anthropic_format.PATH}/count_tokens", service, _count_tokens),
            _post("/tokenize", service, _tokenize),
            _post("/detokenize", service, _detokenize),
            Route("/health", lambda _: JSONResponse({"status": "ok", "resident": service.is_open})),
        ],
        exception_handlers={
            MballError: http.on_mball_error,
            HTTPException: http.on_http_error,
            Exception: http.on_unexpected,
        },
    )
    app.add_middleware(_Counted, service=service)
    return app


class _Counted:
    """Counts what is under way and writes one line for each request; never a text."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def watch(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        with self._service.counted():
            try:
                await self._app(scope, receive, watch)
            finally:
                _log.info("request", path=scope["path"], status=status, seconds=round(time.perf_counter() - began, 4))


def _post(path: str, service: Service, handler: _Handler) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await http.read_body(request, MAX_BODY_BYTES)
        except TimeoutError:
            raise InvalidRequest(f"the body was not whole within {BODY_TIMEOUT_S:.0f} s") from None
        return await handler(service, body, request.headers.get(tenants.HEADER, ""))

    return Route(path, endpoint, methods=["POST"])


async def _chat(service: Service, body: bytes, tenant: str) -> Response:
    request = parse(ChatRequest, http.parse_object(body))
    chat = await prepare(service, request, tenant, "/v1/chat/completions")
    form = ChatFormat(
        service.tokenizer,
        request.wanted_logprobs,
        (service.spec.model, service.fingerprint),
        [chat.reader() for _ in chat.jobs],
        include_usage=request.include_usage,
    )
    return chat.answer(service, request, form)


async def _responses(service: Service, body: bytes, tenant: str) -> Response:
    given = parse(ResponsesRequest, http.parse_object(body))
    request = responses_request.chat_request(given)
    chat = await prepare(service, request, tenant, responses_format.PATH)
    form = responses_format.ResponsesFormat(given, service.tokenizer, request.wanted_logprobs, chat.reader())
    return chat.answer(service, request, form)


async def _messages(service: Service, body: bytes, tenant: str) -> Response:
    request = chat_request(parse(MessagesRequest, http.parse_object(body)))
    chat = await prepare(service, request, tenant, anthropic_format.PATH)
    form = anthropic_format.AnthropicFormat(service.spec.model, chat.prompt_tokens, chat.reader())
    return chat.answer(service, request, form)


async def _count_tokens(service: Service, body: bytes, _: str) -> Response:
    request = chat_request(parse(CountRequest, http.parse_object(body)))
    service.check_model(request.model)
    return JSONResponse({"input_tokens": len(await prompt_ids(service, request, anthropic_format.PATH))})


async def _completions(service: Service, body: bytes, tenant: str) -> Response:
    engine = service.generator("/v1/completions")
    request = parse(CompletionRequest, http.parse_object(body))
    service.check_model(request.model)
    wanted = Wanted(request.max_tokens if request.max_tokens is not None else 16, request.logprobs)
    jobs, prompt_tokens = [], 0
    for prompt in await service.token_ids(request.prompt, engine, "prompt"):
        prompt_tokens += len(prompt)
        params = sampling_params(
            request, wanted, len(prompt), engine, service.spec.max_logprobs, service.sampling_defaults
        )
        jobs += [Job(prompt, sampling, salted(tenant, request.cache_salt)) for sampling in params]
    service.check_open()
    served = (service.spec.model, service.fingerprint)
    form = CompletionFormat(service.tokenizer, wanted.logprobs, served, include_usage=request.include_usage)
    running = service.generation(jobs, request.stop)
    return Answer(running, form, prompt_tokens=prompt_tokens, stream=request.stream)


async def _embeddings(service: Service, body: bytes, _: str) -> Response:
    engine = service.embedder("/v1/embeddings")
    request = parse(EmbeddingRequest, http.parse_object(body))
    service.check_model(request.model)
    return await answer_embeddings(service, engine, request)


async def _tokenize(service: Service, body: bytes, _: str) -> Response:
    request = parse(TokenizeRequest, http.parse_object(body))
    service.check_model(request.model)
    return await tokenize(service, request)


async def _detokenize(service: Service, body: bytes, _: str) -> Response:
    request = parse(DetokenizeRequest, http.parse_object(body))
    service.check_model(request.model)
    return await detokenize(service, request)
