"""Opens the swap store beside everything else, and closes it at the end. Without one all is served the same."""

from __future__ import annotations

from typing import Any, Literal

from mball.errors import ConfigError, SwapError
from mball.memory.events import Events
from mball.swap.service import SwapService
from mball.swap.store import Settings

_COST = "serving goes on without: a model that leaves DRAM comes back from its files, and KV is computed again"
_CLOSE_S = 10.0


class SwapKeeper:
    """`service` is the store, once and as long as it is open."""

    def __init__(self, settings: Settings | None, events: Events) -> None:
        """`settings` None: none is wanted."""
        self.service: SwapService | None = None
        self._settings = settings
        self._events = events
        self._state: Literal["none", "opening", "open", "unavailable", "closed"] = "none"
        self._error: str | None = None

    async def open(self) -> bool:
        """Whether there is a store now. Where there is none, one warning says why, and what that costs."""
        if self._settings is None:
            return False
        self._state = "opening"
        try:
            self.service = await SwapService.open(self._settings)
        except (SwapError, ConfigError, OSError, TimeoutError) as error:
            self._state = "unavailable"
            self._error = str(error) or f"swap: {self._settings.path} could not be made in time"
            self._events.record("swap unavailable", None, f"{self._error}; {_COST}", level="warning")
            return False
        self._state = "open"
        status = self.service.store.status()
        figures = {name: status[name] for name in ("total_bytes", "images", "blocks", "read_only")}
        self._events.record("swap open", None, status["path"], **figures)
        return True

    async def close(self) -> None:
        """Idempotent."""
        service, self.service = self.service, None
        if service is None:
            return
        self._state = "closed"
        if not await service.close(_CLOSE_S):
            self._events.record("swap hangs", None, f"its disk did not answer for {_CLOSE_S:.0f} s", level="error")

    def snapshot(self) -> dict[str, Any] | None:
        """JSON for `/mball/v1/state`; None where none is wanted."""
        if self._settings is None:
            return None
        status = {} if self.service is None else self.service.store.status()
        return {"path": str(self._settings.path), **status, "state": self._state, "error": self._error}
