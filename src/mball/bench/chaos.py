"""Chaos: many requests for more models than fit, while workers are killed at every step of their lives, and hang.

The gateway, the manager and the clients run in one process, the workers in theirs. What a model answers alone is asked
first; then each answer under chaos is compared with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvicorn

from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec
from mball.server.config import Config
from mball.server.gateway.app import create_app
from mball.units import MiB

PHASES = ("start", "promote", "canary", "demote", "stop", "drain", "serve", "awake", "asleep")
"""Where a worker can be when it is killed (`Manager.workers`)."""
PROMPTS = ("Once upon a time", "The capital of France is", "def main():", "1, 2, 3,", "Dear friend")
SETTINGS = Settings(
    start_s=60.0,
    promote_s=5.0,
    canary_s=5.0,
    demote_s=5.0,
    drain_s=20.0,
    release_s=0.3,
    verb_s=3.0,
    term_s=1.0,
    start_attempts=6,
    backoff_s=0.05,
    cool_down_s=2.0,
    swap_time_share=0.5,
    max_stay_s=0.5,
    max_wait_s=0.5,
    slack_bytes=8 * MiB,
    working_bytes=0,
)
"""Short stays, so that there are many swaps; deadlines that a hung worker meets soon."""
_SEEN_S = 1.0
_LIAR_SHARE = 0.25
"""Of what another model is asked for: each of its demotions ends its worker."""
_WARM_SWAPS = 100


@dataclass(frozen=True)
class Plan:
    """`kill_s`: between two faults, on average; every `hang_every`th is a SIGSTOP. `device_bytes`: of the pretended
    device. `liar`: a model that keeps what it says it gave back, whose answers aren't compared."""

    models: Sequence[ModelSpec]
    command_for: Callable[[ModelSpec], list[str]]
    zygote_for: Callable[[ModelSpec], list[str] | None]
    device_bytes: int
    requests: int = 5000
    swaps: int = 500
    clients: int = 8
    tokens: int = 8
    kill_s: float = 1.0
    hang_every: int = 12
    liar: str | None = None
    request_s: float = 60.0
    settings: Settings = SETTINGS
    context_bytes: int = MiB
    dram_bytes: int = 512 * MiB
    seed: int = 0


@dataclass
class Result:
    """Counts of one run. An outcome is of a request's first try, and `later` of the one after its Retry-After."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    later: Counter[str] = field(default_factory=Counter)
    refused_twice: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    hangs: Counter[str] = field(default_factory=Counter)
    swaps: int = 0
    starts: int = 0
    crashes: int = 0
    refusals: int = 0
    rss: list[tuple[int, int]] = field(default_factory=list)
    orphans: int = 0
    broken_books: int = 0
    seconds: float = 0.0

    @property
    def at_once(self) -> float:
        """Share answered 200 at once of those that were not in flight on a killed process."""
        others = sum(self.outcomes.values()) - self.outcomes["lost"]
        return self.outcomes["ok"] / others if others else 1.0

    @property
    def after_one_retry(self) -> float:
        """Share answered 200 at once or after one Retry-After, of those whose second try no killed process ended."""
        return (self.outcomes["ok"] + self.later["ok"]) / max(1, self.requests - self.later["lost"])

    @property
    def rss_drift(self) -> float | None:
        """Of the manager's memory from the 100th swap to the end; None where there were too few after it."""
        known = [rss for swap, rss in self.rss if swap >= _WARM_SWAPS]
        if len(known) < 20:
            return None
        edge = max(5, len(known) // 10)
        first, last = sorted(known[:edge])[edge // 2], sorted(known[-edge:])[edge // 2]
        return last / first - 1

    def as_dict(self) -> dict[str, Any]:
        drift = self.rss_drift
        return {
            "requests": self.requests,
            "swaps": self.swaps,
            "starts": self.starts,
            "crashes": self.crashes,
            "faults": dict(self.faults),
            "hangs": dict(self.hangs),
            "outcomes": dict(self.outcomes),
            "outcomes_after_retry": dict(self.later),
            "share_at_once": self.at_once,
            "share_after_one_retry": self.after_one_retry,
            "refused_twice": dict(self.refused_twice),
            "wrong": len(self.wrong),
            "wrong_examples": self.wrong[:5],
            "rss_drift": None if drift is None else round(drift, 5),
            "refusals": self.refusals,
            "orphans": self.orphans,
            "broken_books": self.broken_books,
            "seconds": round(self.seconds, 1),
        }


async def run(plan: Plan, told: Callable[[Result], None] = lambda _: None) -> Result:
    """One run. Raises MballError where a model does not even serve alone."""
    result, began = Result(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mball-chaos-") as name:
        folder = Path(name)
        expected = await _alone(plan, folder)
        async with _serving(plan, plan.models, folder / "chaos") as (manager, device, session):
            run_ = _Run(plan, manager, session, expected, result, told)
            await run_.go()
            result.refusals = device.refusals
            result.broken_books = sum(event.kind == "books wrong" for event in manager.events.recent(1 << 20))
    left = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    result.orphans = len(left)
    result.seconds = time.monotonic() - began
    return result


async def _alone(plan: Plan, folder: Path) -> dict[tuple[str, str], str]:
    """What each model says to each prompt while nothing else happens, one sequence at a time."""
    expected = {}
    for model in plan.models:
        if model.name == plan.liar:
            continue
        quiet = replace(model, worker=replace(model.worker, max_num_seqs=1))
        async with _serving(plan, [quiet], folder / "alone") as (_, _, session):
            for prompt in PROMPTS:
                outcome, text, _ = await _ask(session, model.name, prompt, plan, stream=False)
                if outcome != "ok":
                    raise RuntimeError(f"{model.name} does not serve alone: {outcome} {text}")
                expected[model.name, prompt] = text
    return expected


@contextlib.asynccontextmanager
async def _serving(
    plan: Plan, models: Sequence[ModelSpec], folder: Path
) -> AsyncIterator[tuple[Manager, SimulatedDevice, aiohttp.ClientSession]]:
    device = await asyncio.to_thread(_device, plan, folder)
    manager = Manager(
        models,
        [(device, plan.device_bytes)],
        dram_bytes=plan.dram_bytes,
        runtime_dir=folder,
        command_for=plan.command_for,
        zygote_for=plan.zygote_for,
        settings=plan.settings,
    )
    config = Config(request_timeout_s=plan.request_s, queue_timeout_s=plan.request_s, drain_timeout_s=5.0)
    socket = str(folder / "gateway.sock")
    options: dict[str, Any] = {"log_config": None, "access_log": False, "timeout_keep_alive": 600}
    server = uvicorn.Server(uvicorn.Config(create_app(manager, config), uds=socket, **options))
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started and not serving.done():  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        timeout = aiohttp.ClientTimeout(total=2 * plan.request_s)
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket, limit=0), timeout=timeout) as session:
            yield manager, device, session
    finally:
        server.should_exit = True
        await serving


def _device(plan: Plan, folder: Path) -> SimulatedDevice:
    folder.mkdir(exist_ok=True)
    return SimulatedDevice.create(folder / "device", plan.device_bytes, context_bytes=plan.context_bytes)


async def _ask(
    session: aiohttp.ClientSession, model: str, prompt: str, plan: Plan, *, stream: bool
) -> tuple[str, str, float]:
    """(outcome, text, Retry-After): ok, lost (its worker ended), refused (503 with a Retry-After), or what is wrong."""
    body = {"model": model, "prompt": prompt, "max_tokens": plan.tokens, "temperature": 0, "stream": stream}
    try:
        async with session.post("http://gateway/v1/completions", json=body) as answer:
            data = await answer.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        return "broken", repr(error), 0.0
    if answer.status == 200:
        return (*(_events(data) if stream else ("ok", str(json.loads(data)["choices"][0]["text"]))), 0.0)
    text = data.decode(errors="replace")
    after = answer.headers.get("retry-after")
    if answer.status != 503 or after is None:
        return f"{answer.status} without Retry-After" if answer.status == 503 else str(answer.status), text, 0.0
    return "lost" if _is_lost(text) else "refused", text, float(after)


def _events(data: bytes) -> tuple[str, str]:
    """A stream's outcome: it ends whole, or with an error event, and never with both or neither."""
    text, ends = "", []
    for line in data.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        event = line.removeprefix(b"data: ")
        if event == b"[DONE]":
            ends.append("ok")
        elif "error" in (said := json.loads(event)):
            ends.append("lost" if _is_lost(json.dumps(said)) else "error event")
        else:
            text += "".join(choice.get("text", "") for choice in said["choices"])
    return (ends[0] if len(ends) == 1 else f"stream with {len(ends)} ends"), text


def _is_lost(text: str) -> bool:
    return "ended while it answered" in text or "no whole answer within" in text


class _Run:
    def __init__(
        self,
        plan: Plan,
        manager: Manager,
        session: aiohttp.ClientSession,
        expected: dict[tuple[str, str], str],
        result: Result,
        told: Callable[[Result], None],
    ) -> None:
        self._plan = plan
        self._manager = manager
        self._session = session
        self._expected = expected
        self._result = result
        self._told = told
        self._random = random.Random(plan.seed)
        self._names = [model.name for model in plan.models]
        self._weights = [_LIAR_SHARE if name == plan.liar else 1.0 for name in self._names]
        self._hung: dict[int, float] = {}
        self._memory = psutil.Process()
        self._said = ""

    async def go(self) -> None:
        plan, result = self._plan, self._result
        faults = asyncio.create_task(self._break())
        watch = asyncio.create_task(self._watch())
        try:
            while result.requests < plan.requests or result.swaps < plan.swaps:
                await asyncio.gather(*(self._client() for _ in range(plan.clients)))
                self._told(result)
        finally:
            for task in (faults, watch):
                task.cancel()
            await asyncio.gather(faults, watch, return_exceptions=True)
            for pid in self._hung:
                _send(pid, signal.SIGCONT)
        self._count()

    async def _client(self) -> None:
        """A few requests of one client, each with its outcome."""
        for _ in range(5):
            (model,) = self._random.choices(self._names, self._weights)
            prompt = self._random.choice(PROMPTS)
            stream = self._random.random() < 0.25
            self._result.requests += 1
            outcome, after = await self._one(model, prompt, stream)
            self._result.outcomes[outcome] += 1
            if outcome in ("lost", "refused", "error event"):
                await asyncio.sleep(min(after or 1.0, 30.0))
                again, _ = await self._one(model, prompt, stream)
                self._result.later[again] += 1
                if again == "refused":
                    self._result.refused_twice[f"{model}: {self._said}"] += 1

    async def _one(self, model: str, prompt: str, stream: bool) -> tuple[str, float]:
        outcome, text, after = await _ask(self._session, model, prompt, self._plan, stream=stream)
        if outcome == "refused":
            self._said = text[:300]
        if outcome == "ok" and model != self._plan.liar and text != self._expected[model, prompt]:
            self._result.wrong.append(f"{model}: {prompt!r}: {text!r}, alone {self._expected[model, prompt]!r}")
            outcome = "wrong"
        return outcome, after

    async def _break(self) -> None:
        """Faults, each in the phase that was hit least of those that are seen within a while."""
        number = 0
        while True:
            await asyncio.sleep(self._plan.kill_s * self._random.uniform(0.3, 1.7))
            number += 1
            hit = await self._seen()
            if hit is None:
                continue
            pid, phase = hit
            if number % self._plan.hang_every == 0 and _send(pid, signal.SIGSTOP):
                self._result.hangs[phase] += 1
                self._hung[pid] = time.monotonic()
            elif _send(pid, signal.SIGKILL):
                self._result.faults[phase] += 1

    async def _seen(self) -> tuple[int, str] | None:
        """A worker in a rare phase: the longer it takes, the more common the phase may be."""
        began, best = time.monotonic(), None
        rare = sorted(PHASES, key=lambda phase: self._result.faults[phase])
        while (waited := time.monotonic() - began) < _SEEN_S:
            allowed = rare[: 1 + math.floor(waited / _SEEN_S * len(rare))]
            for pid, (_, phase) in self._manager.workers().items():
                if phase in allowed and pid not in self._hung:
                    return pid, phase
                best = (pid, phase)
            await asyncio.sleep(0.001)
        return best

    async def _watch(self) -> None:
        """Memory of this process at each swap."""
        while True:
            await asyncio.sleep(0.1)
            self._count()
            if not self._result.rss or self._result.rss[-1][0] != self._result.swaps:
                self._result.rss.append((self._result.swaps, self._memory.memory_info().rss))

    def _count(self) -> None:
        state = self._manager.snapshot()
        self._result.swaps = state["promotions"]
        self._result.crashes = state["crashes"]
        self._result.starts = sum(model["starts"] for model in state["models"])


def _send(pid: int, number: int) -> bool:
    """These are children of this process, so that the pid is theirs until they are waited for."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
