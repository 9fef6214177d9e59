"""Embeddings: one vector a text."""

from __future__ import annotations

import base64
from functools import partial

import numpy as np
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mball.errors import InvalidRequest
from mball.server.engine.api import Embedder
from mball.server.http import ClientLeft, unless_disconnected
from mball.server.worker.protocol import EmbeddingRequest, TokenIds
from mball.server.worker.service import Service
from mball.server.worker.threads import in_thread

TEXTS_PER_CALL = 32
"""A client that leaves, and a demotion, wait for one call of the engine at most."""


async def answer_embeddings(service: Service, engine: Embedder, request: EmbeddingRequest) -> Response:
    """Raises InvalidRequest for a text that is too long and for another number of dimensions, NotResident."""
    if request.dimensions not in (None, engine.hidden_size):
        raise InvalidRequest(
            f"{service.spec.model} gives {engine.hidden_size} dimensions, not {request.dimensions}", param="dimensions"
        )
    prompts = await service.token_ids(request.input, engine, "input")
    service.check_open()
    return _Vectors(service, engine, prompts, request.encoding_format)


class _Vectors(Response):
    def __init__(self, service: Service, engine: Embedder, prompts: list[TokenIds], encoding: str) -> None:
        super().__init__()
        self._service = service
        self._engine = engine
        self._prompts = prompts
        self._encode = _base64 if encoding == "base64" else list

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await unless_disconnected(self._compute(), receive)
        except ClientLeft:
            return
        await response(scope, receive, send)

    async def _compute(self) -> Response:
        vectors: list[list[float]] = []
        for start in range(0, len(self._prompts), TEXTS_PER_CALL):
            async with self._service.embedding:
                self._service.check_open()
                batch = self._prompts[start : start + TEXTS_PER_CALL]
                vectors += await in_thread(partial(self._engine.embed, batch))
        tokens = sum(map(len, self._prompts))
        data = [{"object": "embedding", "index": i, "embedding": self._encode(v)} for i, v in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self._service.spec.model, "usage": usage})


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
