"""`/tokenize` and `/detokenize`, as vLLM has them: what a prompt is in tokens, and what tokens are in text."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from starlette.responses import JSONResponse, Response

from mball.errors import InvalidRequest
from mball.server.worker.messages import ChatMessage, read_messages
from mball.server.worker.protocol import Request, TokenIds
from mball.server.worker.service import Service
from mball.server.worker.values import encodable

MOST_TOKENS = 1 << 20


class TokenizeRequest(Request):
    """A `prompt`, or `messages` in the model's chat template."""

    prompt: Annotated[str, AfterValidator(lambda text: encodable(text, "prompt"))] | None = None
    messages: Annotated[list[ChatMessage], BeforeValidator(read_messages)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give `prompt` or `messages`", param="prompt")
        if self.messages is not None and not self.add_special_tokens:
            raise InvalidRequest("a chat template has its own special tokens", param="add_special_tokens")
        return self


class DetokenizeRequest(Request):
    tokens: TokenIds = Field(max_length=MOST_TOKENS)


async def tokenize(service: Service, request: TokenizeRequest) -> Response:
    tokenizer, limit = service.tokenizer, service.engine.max_model_len

    def encode() -> TokenIds:
        if request.messages is not None:
            return tokenizer.encode_chat(request.messages, limit)
        return tokenizer.encode(request.prompt or "", limit, special=request.add_special_tokens)

    ids = await service.in_text_thread(encode)
    strings = await service.in_text_thread(lambda: tokenizer.strings(ids)) if request.return_token_strs else None
    return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})


async def detokenize(service: Service, request: DetokenizeRequest) -> Response:
    most = service.tokenizer.vocab_size
    if (wrong := next((token for token in request.tokens if not 0 <= token < most), None)) is not None:
        raise InvalidRequest(f"{wrong} is no token of this model: it has {most}", param="tokens")
    text = await service.in_text_thread(lambda: service.tokenizer.text(request.tokens))
    return JSONResponse({"prompt": text})
