"""A vLLM from nothing to its first token: as stock, as MBALL's worker started afresh, and forked from a zygote.

All serve the same model with the same options in turn, each in a folder of its own for what vLLM compiles; one turn of
each comes before those that count, so that this is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from rich.console import Console

from mball.bench.machine import describe, versions
from mball.bench.report import Column, Kept, Report, Spread
from mball.bench.runner import Measures, Outcome
from mball.bench.served import Served
from mball.bench.vllm_stock import stock
from mball.device.device import open_device
from mball.errors import MballError
from mball.memory.nursery import Nursery
from mball.memory.process import WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.server.engine_path import search_path
from mball.units import format_bytes

STOCK, FRESH, FORKED = "vllm serve", "mball, fresh", "mball, zygote"
_TOKENS = 8
_STAGES = ("import_s", "engine_s", "device_s", "weights_s", "kv_s", "warm_up_s", "serve_s")
_COLUMNS = [
    Column("first token s", lambda outcome: str(Spread.of([r["first_token_s"] for r in outcome.rounds]))),
    *(
        Column(
            name.removesuffix("_s").replace("_", " "),
            lambda outcome, name=name: (  # type: ignore[misc]
                f"{statistics.median(r[name] for r in outcome.rounds):.2f}" if name in outcome.rounds[0] else ""
            ),
        )
        for name in _STAGES
    ),
]


@dataclass(frozen=True, slots=True)
class Options:
    """`python` has vLLM. `eager`: nothing is compiled or captured."""

    model: Path
    python: Path
    device: str = "cpu"
    kv_bytes: int = 1 << 30
    max_model_len: int = 1024
    eager: bool = False
    rounds: int = 3
    timeout_s: float = 900.0


Turn = Callable[[Path, int], Awaitable[tuple[Measures, str]]]
"""One start in a folder; its number. What it took, and what it answered. Raises MballError."""


def run_start(options: Options, *, json_path: Path | None, markdown_path: Path | None, console: Console) -> bool:
    """Whether all answered alike. Raises ConfigError."""
    report = Report(
        benchmark="vllm-start",
        setting={"device": options.device, "eager": str(options.eager)},
        title="vLLM from its process's start to the first token",
        command=shlex.join(["mball", *sys.argv[1:]]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe("cuda" if options.device.startswith("cuda") else "cpu"),
        versions=versions(["mball"]),
        subject={"model": options.model.name, "KV": format_bytes(options.kv_bytes), "python": str(options.python)},
        outcomes=[],
        notes=["Seconds; each one's compile cache is warm. Stages are those of MBALL's worker; the zygote is ready."],
    )
    kept = Kept(report, json=json_path, markdown=markdown_path)
    outcomes = asyncio.run(_all(options, kept, console))
    kept.end(console, _verdicts(outcomes), _COLUMNS, [], "s")
    return all(outcome.not_run is None for outcome in outcomes)


def _verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    found = {o.name: statistics.median(r["first_token_s"] for r in o.rounds) for o in outcomes if o.rounds}
    if STOCK not in found:
        return []
    shares = [f"{name} takes {found[name] / found[STOCK]:.2f}" for name in (FRESH, FORKED) if name in found]
    return [f"Of stock's time {', '.join(shares)} (wanted: 0.40 at most)."] if shares else []


async def _all(options: Options, kept: Kept, console: Console) -> list[Outcome]:
    with tempfile.TemporaryDirectory(prefix="mball-bench-") as name:
        folder = Path(name)
        spec = WorkerSpec(
            "m",
            str(options.model.absolute()),
            device=open_device(options.device).name,
            max_model_len=options.max_model_len,
            kv_cache_bytes=options.kv_bytes,
            threads=len(os.sched_getaffinity(0)),
            engine="vllm",
            engine_python=str(options.python),
            engine_args={"enforce_eager": True} if options.eager else {},
        )
        async with contextlib.AsyncExitStack() as ends:
            turns: dict[str, Turn] = {
                STOCK: _Stock(options, spec),
                FRESH: await _ours(options, spec, folder / "fresh", ends, zygote=False),
                FORKED: await _ours(options, spec, folder / "forked", ends, zygote=True),
            }
            outcomes = [Outcome(name) for name in turns]
            answers: set[str] = set()
            # Ours share a folder: one of them comes before for both.
            before = [outcome for outcome in outcomes if outcome.name != FORKED]
            for number in range(options.rounds + 1):
                for outcome in [*outcomes[number % 3 :], *outcomes[: number % 3]] if number else before:
                    if outcome.not_run is not None:
                        continue
                    console.print(f"{outcome.name}: {number or 'before'}", style="dim")
                    try:
                        took, answer = await turns[outcome.name](folder, number)
                    except (MballError, OSError) as error:
                        outcome.not_run, outcome.rounds = str(error).replace("\n", " ")[-600:], []
                        continue
                    answers.add(answer)
                    if number:
                        outcome.rounds.append(took)
                    console.print(str({name: round(seconds, 2) for name, seconds in took.items()}), style="dim")
                    kept.round(outcomes)
            if len(answers) > 1:
                for outcome in outcomes:
                    outcome.not_run, outcome.rounds = f"they answered differently: {sorted(answers)}", []
            return outcomes


async def _ours(
    options: Options, spec: WorkerSpec, folder: Path, ends: contextlib.AsyncExitStack, *, zygote: bool
) -> Turn:
    command = _command(options)
    lines = {command: [str(options.python), "-m", "mball.server.worker.vllm_zygote"]} if zygote else {}
    path = await asyncio.to_thread(search_path, folder / "path")
    nursery = Nursery(lines, _settings(options), folder, folder, {command: path})
    await nursery.open()
    ends.push_async_callback(nursery.close)
    return _Ours(options, spec, nursery, folder, path)


def _command(options: Options) -> tuple[str, ...]:
    return (str(options.python), "-m", "mball.server.worker.vllm_process")


def _settings(options: Options) -> Settings:
    return Settings(start_s=options.timeout_s, verb_s=20.0)


class _Ours:
    def __init__(self, options: Options, spec: WorkerSpec, nursery: Nursery, folder: Path, path: str) -> None:
        self._options, self._spec, self._nursery = options, spec, nursery
        self._folder, self._path = folder, path

    async def __call__(self, folder: Path, number: int) -> tuple[Measures, str]:
        where = self._folder
        spec = replace(self._spec, socket_path=str(where / f"{number}.sock"))
        extra = {"PYTHONPATH": self._path, "VLLM_CACHE_ROOT": str(folder / "ours")}
        began = time.monotonic()
        worker, hello = await WorkerProcess.start(
            _command(self._options),
            spec,
            extra_environment=extra,
            log=where / "w.log",
            settings=_settings(self._options),
            launch=self._nursery.launch,
        )
        try:
            connector = aiohttp.UnixConnector(spec.socket_path)
            async with aiohttp.ClientSession("http://worker", connector=connector) as session:
                served = Served(session, spec.model)
                await served.say(1)
                took = time.monotonic() - began
                return {"first_token_s": took, **hello.stages}, (await served.say(_TOKENS)).text
        finally:
            await worker.stop(_settings(self._options))


class _Stock:
    def __init__(self, options: Options, spec: WorkerSpec) -> None:
        self._options, self._spec = options, spec

    async def __call__(self, folder: Path, number: int) -> tuple[Measures, str]:
        began = time.monotonic()
        options = self._options
        extra = {"VLLM_CACHE_ROOT": str(folder / "stock")}
        async with stock(options.python, self._spec, folder, extra=extra, timeout_s=options.timeout_s) as server:
            await server.served.say(1)
            took = time.monotonic() - began
            return {"first_token_s": took}, (await server.served.say(_TOKENS)).text
