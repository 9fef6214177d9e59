"""What the process allocator promises, measured on the device: starts that don't collide, bytes of a killed worker
that come back at once, and a switch that waits for nobody's start.

The manager runs in this process, the workers in theirs; no gateway is between.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from mball.device.device import Device, open_device
from mball.errors import MballError
from mball.memory.manager import Manager
from mball.server.catalog import build_manager
from mball.server.config import Config, ModelConfig
from mball.units import MiB, format_bytes

_POLL_S = 0.002
_DEADLINE_S = 600.0
_LOOK_S = 0.05
_SLACK_BYTES = 96 * MiB
_ROOM = 1.5
"""Of what one model needs: it and the contexts of two more have room, no two models."""


@dataclass(frozen=True)
class Options:
    """`model` is served `together` times at once, each with `share_bytes` of the device; it is also what switches.
    A worker of `large` is killed `kills` times while its weights are on the device."""

    model: Path
    large: Path
    device: str
    share_bytes: int
    kv_bytes: int
    dram_bytes: int
    together: int = 4
    kills: int = 20
    switches: int = 20


@dataclass
class Together:
    """Models started at one moment. `failures`: what went wrong, in words; `over_bytes`: held beyond its share at
    any time, the most of all; `needed_bytes`: what MBALL thinks that each needs."""

    seconds: float = 0.0
    ready_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    over_bytes: int = 0
    needed_bytes: int = 0
    held_bytes: list[int] = field(default_factory=list)

    def collisions(self, slack_bytes: int = _SLACK_BYTES) -> int:
        return len(self.failures) + (self.over_bytes > slack_bytes)


@dataclass
class Killed:
    """From SIGKILL, a figure for each: until the device showed the bytes free, and until none was promised."""

    held_bytes: int = 0
    shown_s: list[float] = field(default_factory=list)
    promised_s: list[float] = field(default_factory=list)

    @property
    def after_s(self) -> list[float]:
        """From the device's to the promise's end."""
        return [max(0.0, p - s) for p, s in zip(self.promised_s, self.shown_s, strict=True)]


@dataclass
class Switches:
    """Seconds of a request for the model that is not on the device: alone, and while a third one starts."""

    alone_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    start_s: float = 0.0

    @property
    def ratio(self) -> float:
        if not self.alone_s or not self.beside_s:
            return float("nan")
        return statistics.median(self.beside_s) / statistics.median(self.alone_s)


async def together(options: Options) -> Together:
    """All asked for at once, on a device that has room for their shares and no more."""
    found = Together()
    names = [f"model-{number}" for number in range(options.together)]
    budget = options.together * options.share_bytes
    async with _managed(options, dict.fromkeys(names, options.model), budget) as manager:
        device = open_device(options.device)
        watch = asyncio.create_task(_watch(manager, device, options.share_bytes, found))
        began = time.monotonic()
        try:
            answers = await asyncio.gather(*(_ask(manager, name) for name in names), return_exceptions=True)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        found.seconds = time.monotonic() - began
        found.ready_s = [at - began for at in answers if isinstance(at, float)]
        found.failures = [f"{type(error).__name__}: {error}" for error in answers if isinstance(error, BaseException)]
        for state in manager.snapshot()["models"]:
            found.held_bytes.append(state["device_bytes"])
            found.needed_bytes = max(found.needed_bytes, state["needed_bytes"])
            found.failures += [f"{state['name']}: {state['crashes']} crashes"] if state["crashes"] else []
    return found


async def killed(options: Options) -> Killed:
    """One worker, killed again and again as soon as it has answered."""
    found = Killed()
    device = open_device(options.device)
    async with _managed(options, {"large": options.large}, device.total_bytes) as manager:
        for _ in range(options.kills):
            await _ask(manager, "large")
            state = _state(manager, "large")
            found.held_bytes = state["device_bytes"]
            before = await asyncio.to_thread(device.free_bytes)
            began = time.monotonic()
            os.kill(state["pid"], signal.SIGKILL)
            shown = asyncio.create_task(_shown(device, state["pid"], before + state["device_bytes"], began))
            while (now := _state(manager, "large"))["promised_bytes"] and now["pid"] in (state["pid"], None):
                await _pause(began)
            found.promised_s.append(time.monotonic() - began)
            found.shown_s.append(await shown)
    return found


async def switches(options: Options, needed_bytes: int) -> Switches:
    """Two models that don't fit together take turns, first alone, then while a third one's worker starts afresh.

    Each needs `needed_bytes`. Raises MballError where they don't take turns.
    """
    found = Switches()
    room = round(_ROOM * needed_bytes)
    models = dict.fromkeys(("a", "b", "c"), options.model)
    async with _managed(options, models, room, zygote=False) as manager:
        for name in ("a", "b", "a", "b"):
            await _ask(manager, name)
        before = manager.snapshot()["promotions"]
        for number in range(options.switches):
            found.alone_s.append(await _timed(manager, "ab"[number % 2]))
        if manager.snapshot()["promotions"] - before != options.switches:
            raise MballError(f"{options.model} and another like it fit into {format_bytes(room)}: nothing was switched")
        began = time.monotonic()
        third = asyncio.create_task(_ask(manager, "c"))
        turn = options.switches
        while not third.done() and _state(manager, "c")["process"] in ("gone", "starting"):
            took = await _timed(manager, "ab"[turn % 2])
            turn += 1
            if _state(manager, "c")["process"] == "starting":
                found.beside_s.append(took)
        found.start_s = time.monotonic() - began
        await third
    return found


@contextlib.asynccontextmanager
async def _managed(
    options: Options, models: dict[str, Path], budget: int, *, zygote: bool = True
) -> AsyncIterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="mball-bench-") as folder:
        config = Config(
            models=[
                ModelConfig(path=path, name=name, max_model_len=1024, kv_cache_memory_bytes=options.kv_bytes)
                for name, path in models.items()
            ],
            device=(options.device,),
            device_memory_bytes=budget,
            dram_bytes=options.dram_bytes,
            # Nobody has to stay: a switch is as long as it is.
            swap_time_share=1.0,
            state_dir=Path(folder) / "state",
            zygote=zygote,
        )
        manager = build_manager(config, Path(folder))
        await manager.start()
        try:
            yield manager
        finally:
            await manager.close(0.0)


async def _ask(manager: Manager, name: str) -> float:
    """One token; when it was there. Raises MballError."""
    async with manager.admit(name, deadline_s=_DEADLINE_S) as ticket:
        timeout = aiohttp.ClientTimeout(total=_DEADLINE_S)
        connector = aiohttp.UnixConnector(ticket.socket_path)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            body = {"model": name, "prompt": "Once", "max_tokens": 1, "temperature": 0}
            async with session.post("http://worker/v1/completions", json=body) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise MballError(f"{name}: {answer.status} {text[:300]}")
    return time.monotonic()


async def _timed(manager: Manager, name: str) -> float:
    began = time.monotonic()
    return await _ask(manager, name) - began


async def _watch(manager: Manager, device: Device, share_bytes: int, found: Together) -> None:
    """What each process holds, as often as the device can be asked."""
    while True:
        for state in manager.snapshot()["models"]:
            if state["pid"] is not None and state["baseline_bytes"] is not None:
                held = await asyncio.to_thread(device.process_bytes, state["pid"], state["baseline_bytes"])
                found.over_bytes = max(found.over_bytes, (held or 0) - share_bytes)
        await asyncio.sleep(_LOOK_S)


async def _shown(device: Device, pid: int, free_bytes: int, began: float) -> float:
    """When the device no longer showed the process, and its bytes free."""
    while True:
        held, free = await asyncio.to_thread(lambda: (device.process_bytes(pid), device.free_bytes()))
        if not held and free >= free_bytes - _SLACK_BYTES:
            return time.monotonic() - began
        await _pause(began)


async def _pause(began: float) -> None:
    if time.monotonic() - began > _DEADLINE_S:
        raise MballError(f"its bytes did not come back within {_DEADLINE_S:.0f} s")
    await asyncio.sleep(_POLL_S)


def _state(manager: Manager, name: str) -> dict[str, Any]:
    models: Sequence[dict[str, Any]] = manager.snapshot()["models"]
    return next(state for state in models if state["name"] == name)
