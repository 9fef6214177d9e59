"""What the manager's side may ask of each of an engine's processes, by vLLM's `collective_rpc`.

Arguments and results are plain JSON. Nothing here waits while the engine computes.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from typing import TYPE_CHECKING, Any, Protocol

from mball.errors import SwapMiss
from mball.loader import vllm_compat
from mball.loader.vllm_names import SERVER_ENVIRONMENT
from mball.memory.engine_stored import stored
from mball.memory.fingerprint import fingerprint_of

if TYPE_CHECKING:
    from mball.memory.engine_image import Vault

_RECENT_S = 0.25

STAGES: dict[str, tuple[float, float]] = {}
"""When each of `vllm_compat.STAGES` began and ended in this process, by the monotonic clock."""


class Steps:
    """When this process last began to compute, by the monotonic clock."""

    def __init__(self) -> None:
        self._at = -math.inf

    def note(self) -> None:
        self._at = time.monotonic()

    def are_recent(self) -> bool:
        return time.monotonic() - self._at < _RECENT_S


STEPS = Steps()


class Process(Protocol):
    """What vLLM's worker class has by itself, and by MBALL's own for its kind of device."""

    rank: int

    def mball_describe(self) -> dict[str, Any]:
        """Bytes of weights, of KV, of this process's part of an image, copied aside in host memory that is not the
        device's, and free on the device (None: unknown)."""

    def mball_vault(self) -> Vault:
        """One for the process's whole life."""


class Rpc:
    """Mixed into vLLM's worker class, whose attributes must not be named as these are."""

    def mball_fill_image(self: Process, path: str, offsets: list[int]) -> None:
        """Begins to fill this process's part of the image at `path`: from `offsets[rank]` on. `mball_image` tells."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.mball_vault().fill(fd, offsets[self.rank])
        finally:
            os.close(fd)

    def mball_image(self: Process) -> dict[str, Any]:
        """`state`: none, filling, ready with the `name` of what is in it, or failed with an `error`."""
        vault = self.mball_vault()
        if (filling := vault.filling) is None:
            return {"state": "none"}
        name = vault.name() if filling.state == "ready" else None
        return {"state": filling.state, "error": filling.error, "name": name}

    def mball_take_image(self: Process, path: str, lost: bool) -> dict[str, Any]:
        """The image at `path` is the one that was filled here; `whole`: nothing more is needed for a wake."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return {"whole": self.mball_vault().take(fd, lost=lost)}
        finally:
            os.close(fd)

    def mball_restore(self: Process, path: str, slots: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
        """Weights that were forgotten, straight from the swap store; `missed`: why not (None: they are there)."""
        try:
            with stored(path, slots, place) as image:
                self.mball_vault().restore(image)
        except SwapMiss as miss:
            return {"missed": miss.reason, "why": str(miss)}
        return {"missed": None}

    def mball_drop_image(self: Process) -> dict[str, Any]:
        """Ends a filling under way, and lets go of the image; `lost`: the parameters, which were in it alone. What no
        reload of the weights makes is kept."""
        buffers = [tensor.untyped_storage().data_ptr() for tensor in vllm_compat.model_of(self).buffers()]
        return {"lost": self.mball_vault().drop(buffers)}

    def mball_stages(self) -> dict[str, Any]:
        """How this process came up; `server_at`: when the server's process had been imported."""
        return {"stages": STAGES, "server_at": float(os.environ.get(SERVER_ENVIRONMENT, "nan"))}

    def mball_fingerprint(self) -> dict[str, Any]:
        """Of the parameters, which are there."""
        return {"fingerprint": f"{fingerprint_of(vllm_compat.model_of(self).parameters()):016x}"}

    def mball_trim(self) -> dict[str, Any]:
        """Freed memory goes back to the kernel; `cached_bytes` of the device's too, which the next step takes again."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return {"cached_bytes": 0}
