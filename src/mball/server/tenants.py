"""Whose request it is, from the gateway to a worker: those of different keys share no KV, so that how fast an answer
comes tells nothing of what others asked."""

from __future__ import annotations

import functools
import hashlib

HEADER = "x-mball-tenant"


@functools.lru_cache(maxsize=1024)
def tenant(key_name: str) -> str:
    """Of a key, by its name; "" where there are no keys."""
    return hashlib.sha256(key_name.encode()).hexdigest() if key_name else ""


def salted(tenant: str, cache_salt: str | None) -> str | None:
    """The salt of a tenant's request, which may have one of its own."""
    if not tenant:
        return cache_salt
    return tenant if cache_salt is None else hashlib.sha256(f"{tenant} {cache_salt}".encode()).hexdigest()
