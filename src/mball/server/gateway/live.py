"""The configuration in force: a request reads it as it comes, a reload replaces it between two requests."""

from __future__ import annotations

from typing import Any

from mball.server.config import Config, KeyConfig
from mball.server.gateway.access import Key, Limits


class Live:
    """`keys` stays the same list, and who was in it goes on with what it has under way."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.keys: list[Key] = []
        self.apply(config)

    def apply(self, config: Config) -> None:
        known = {key.sha256: key for key in self.keys}
        self.config = config
        self.keys[:] = [_key(entry, known.get(entry.sha256)) for entry in config.api_keys]


def _key(entry: KeyConfig, known: Key | None) -> Key:
    limits = Limits(**entry.limits.model_dump())
    what: dict[str, Any] = {"admin": entry.admin, "models": frozenset(entry.models), "limits": limits}
    if known is None:
        return Key(entry.name, entry.sha256, **what)
    known.change(entry.name, **what)
    return known
