"""What `/openapi.json` says beyond what the framework sees: bodies that are read by hand, and the shape of errors."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI

_TEXT = {"type": "string"}
_MODEL = {"type": "string", "minLength": 1, "description": "Of GET /v1/models."}
_STREAM = {"type": ["boolean", "null"]}
_CALL: dict[str, Any] = {"type": "object", "required": ["model"], "properties": {"model": _MODEL, "stream": _STREAM}}
_SIZE = {
    "oneOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]+)? ?[KMGT]iB$"}]
}
_METADATA = {"type": ["object", "null"], "maxProperties": 16, "additionalProperties": {"type": "string"}}
_JSON, _FORM = "application/json", "multipart/form-data"
_BODIES: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("post", "/mball/v1/models/{name}/balloon"): (
        _JSON,
        {"type": "object", "required": ["bytes"], "properties": {"bytes": _SIZE}},
    ),
    ("post", "/v1/batches"): (
        _JSON,
        {
            "type": "object",
            "required": ["input_file_id", "endpoint", "completion_window"],
            "properties": {
                "input_file_id": _TEXT,
                "endpoint": {"enum": ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]},
                "completion_window": {"const": "24h"},
                "metadata": _METADATA,
            },
            "additionalProperties": False,
        },
    ),
    ("post", "/v1/files"): (
        _FORM,
        {
            "type": "object",
            "required": ["file", "purpose"],
            "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
            "additionalProperties": False,
        },
    ),
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe(app: FastAPI, forwarded: tuple[str, ...], public: frozenset[str]) -> None:
    """Completes the app's description. `forwarded`: paths whose bodies go to a worker; `public`: without a key."""
    made = app.openapi

    @functools.cache
    def openapi() -> dict[str, Any]:
        schema = made()
        components = schema.setdefault("components", {})
        components["schemas"] = {"Error": _ERROR}
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                _complete(method, path, operation, forwarded, public)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(
    method: str, path: str, operation: dict[str, Any], forwarded: tuple[str, ...], public: frozenset[str]
) -> None:
    body = (_JSON, _CALL) if path in forwarded else _BODIES.get((method, path))
    if body is not None:
        kind, shape = body
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": shape}}}
    responses = operation["responses"]
    responses.pop("422", None)
    if path in forwarded:
        streamed: dict[str, Any] = {"text/event-stream": {"schema": {}}} if path.endswith("completions") else {}
        responses["200"] = {"description": "OK", "content": {"application/json": {"schema": {}}, **streamed}}
    if path not in public:
        operation["security"] = [{"key": []}]
    for status in ("4XX", "5XX"):
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses.setdefault(status, {"description": "An error in OpenAI's shape.", "content": content})
