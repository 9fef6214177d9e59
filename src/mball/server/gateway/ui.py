"""The page at `/ui`: the ladder, memory, decisions and a chat box, for a browser that brings nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

PATH = "/ui"


def router() -> APIRouter:
    """The page holds nothing of the server: it asks for a key, and reads the routes with it."""
    page, headers = _page()
    routes = APIRouter()

    @routes.get(PATH, include_in_schema=False)
    async def ui() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    return routes


def _page() -> tuple[bytes, dict[str, str]]:
    """Its bytes, and headers by which it runs its own script and style and no other's."""
    folder = resources.files(__package__) / "page"
    style, script = ((folder / name).read_text() for name in ("page.css", "page.js"))
    page = (folder / "page.html").read_text().replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
