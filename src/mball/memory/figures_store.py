"""Figures kept across restarts: one small file in the state folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mball.memory.figures import Figures, Needs
from mball.memory.states import Weights

_log = structlog.get_logger(__name__)
_MOST_MODELS = 1024
_MOST_BYTES = 4 << 20

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Bytes = Annotated[int, Field(ge=0)]


class Kept(BaseModel):
    """One model's figures at one time. `revision` names what they were measured of; `rate` is in requests a second at
    `saved_at` (seconds since 1970)."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True)

    revision: str
    saved_at: _Seconds
    rate: _Seconds = 0.0
    start_s: _Seconds | None = None
    demote_s: _Seconds | None = None
    balloon_s: _Seconds | None = None
    promote_s: dict[str, _Seconds] = Field(default_factory=dict)
    held_bytes: _Bytes = 0
    busy_requests: Annotated[int, Field(ge=0)] = 0
    context_bytes: _Bytes = 0
    weights_bytes: _Bytes = 0
    kv_bytes: _Bytes = 0
    working_bytes: _Bytes = 0
    load_rate: _Seconds | None = None
    source_rate: _Seconds | None = None

    @classmethod
    def of(cls, figures: Figures, revision: str, rate: float, saved_at: float) -> Kept:
        needs = figures.needs or Needs(0, 0, 0, 0)
        return cls(
            revision=revision,
            saved_at=saved_at,
            rate=rate,
            start_s=figures.start_s.value,
            demote_s=figures.demote_s.value,
            balloon_s=figures.balloon_s.value,
            promote_s={rung.value: s.value for rung, s in figures.promote_s.items() if s.value is not None},
            held_bytes=figures.held.value,
            busy_requests=figures.busy.value,
            context_bytes=needs.context_bytes,
            weights_bytes=needs.weights_bytes,
            kv_bytes=needs.kv_bytes,
            working_bytes=needs.working_bytes,
            load_rate=figures.load_rate,
            source_rate=figures.source_rate.value,
        )

    def figures(self) -> Figures:
        figures = Figures(load_rate=self.load_rate)
        figures.start_s.value, figures.demote_s.value = self.start_s, self.demote_s
        figures.source_rate.value = self.source_rate
        figures.balloon_s.value, figures.held.value = self.balloon_s, self.held_bytes
        figures.busy.value = self.busy_requests
        for rung in Weights:
            figures.promote_s[rung].value = self.promote_s.get(rung.value)
        if self.weights_bytes:
            figures.needs = Needs(self.context_bytes, self.weights_bytes, self.kv_bytes, self.working_bytes)
        return figures


class _File(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    models: dict[str, Kept] = Field(default_factory=dict)


class FiguresStore:
    """The file. Both methods block, and neither raises: figures lost are measured anew."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "figures.json"

    def load(self) -> dict[str, Kept]:
        """By model. A damaged file is warned of once and is as none."""
        try:
            with self.path.open("rb") as file:
                return _File.model_validate_json(file.read(_MOST_BYTES)).models
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{error.error_count()} defects"
            _log.warning(
                "figures not read: what models take and how long moves last is measured anew",
                file=str(self.path),
                reason=why,
            )
            return {}

    def save(self, models: dict[str, Kept]) -> bool:
        """Beside what is there of models that this server does not have. As a whole or not at all."""
        fresh = self.path.with_name(f".figures.{os.getpid()}.new")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = {**self._others(), **models}
            newest = sorted(found.items(), key=lambda entry: -entry[1].saved_at)[:_MOST_MODELS]
            with fresh.open("w") as file:
                file.write(_File(models=dict(newest)).model_dump_json(indent=1))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            _log.warning("figures not kept", file=str(self.path), reason=error.strerror)
            return False
        return True

    def _others(self) -> dict[str, Kept]:
        try:
            return _File.model_validate_json(self.path.read_bytes()).models
        except (OSError, ValidationError):
            return {}
