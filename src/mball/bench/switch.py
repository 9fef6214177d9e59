"""`mball bench switch`: two models take turns on memory for one. `mball serve` brings in whichever is asked for; beside
it two of vLLM's own servers, put to sleep and woken by hand."""

from __future__ import annotations

import asyncio
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from mball.bench.machine import describe, versions
from mball.bench.report import Column, Kept, Report, Spread
from mball.bench.runner import Outcome
from mball.bench.switch_mball import both_at_once, in_turn
from mball.bench.switch_stock import by_hand
from mball.device.device import members, open_device
from mball.errors import MballError
from mball.loader import Checkpoint
from mball.memory.spec import WorkerSpec
from mball.units import GiB, format_bytes

MBALL, STOCK = "mball serve", "vllm serve, asleep by hand"
WANTED = {"switch_s": 0.6, "p95": 0.9, "tokens": 0.99}
"""On an H100 with 8B in bf16."""

_ROOM = 1.5
_CONTEXTS_BYTES = 3 * GiB
"""Of two models, for each GPU that they are spread over: each rank has something on the others' too."""


@dataclass(frozen=True, slots=True)
class Options:
    """`vllm` is an interpreter that has it; without one the embedded engine serves, and has no peer. `room_bytes` of
    the device are MBALL's: for one model awake and the other asleep. On a device of several GPUs a model is spread over
    them, and bytes are each one's."""

    model: Path
    vllm: Path | None = None
    device: str = "cuda"
    kv_bytes: int = 2 * GiB
    dram_bytes: int = 40 * GiB
    room_bytes: int | None = None
    max_model_len: int = 1024
    eager: bool = False
    switches: int = 50
    batches: tuple[int, ...] = (1, 32)
    tokens: int = 256
    together: bool = True
    peer: bool = True
    timeout_s: float = 900.0

    def spec(self, name: str) -> WorkerSpec:
        return WorkerSpec(
            name,
            str(self.model.absolute()),
            device=open_device(self.device).name,
            max_model_len=self.max_model_len,
            max_num_seqs=max(8, *self.batches),
            kv_cache_bytes=self.kv_bytes,
            engine="transformers" if self.vllm is None else "vllm",
            engine_args=self._engine_args(),
        )

    def _engine_args(self) -> dict[str, Any]:
        if self.vllm is None:
            return {}
        eager = {"enforce_eager": True} if self.eager else {}
        return {**eager, "tensor_parallel_size": self._gpus} if self._gpus > 1 else eager

    @property
    def _gpus(self) -> int:
        return len(members(self.device))

    def room(self) -> int:
        """Raises CheckpointError where the model's files don't tell."""
        weights = Checkpoint.open(self.model).image_bytes // self._gpus
        return self.room_bytes or round(_ROOM * (weights + self.kv_bytes)) + _CONTEXTS_BYTES * self._gpus


def run_switch(options: Options, *, json_path: Path | None, markdown_path: Path | None, console: Console) -> bool:
    """Whether all answered, and always alike. Raises ConfigError."""
    report = Report(
        benchmark="switch",
        setting={"device": options.device, "engine": "vllm" if options.vllm else "transformers"},
        title="Two models take turns: from the request to the first token",
        command=shlex.join(["mball", *sys.argv[1:]]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe("cuda" if options.device.startswith("cuda") else "cpu"),
        versions=versions(["mball", "torch", "transformers"]),
        subject={
            "model": options.model.name,
            "weights": format_bytes(Checkpoint.open(options.model).image_bytes),
            "KV": format_bytes(options.kv_bytes),
            "room for MBALL": format_bytes(options.room()),
            "compiled and captured": str(not options.eager),
        },
        outcomes=[],
        notes=[
            "Both models are the same files under two names. A switch: from the request for the one that sleeps to its "
            "first token, streamed; by hand it is the call that puts the other to sleep, the one that wakes this one, "
            "and the request. Tokens/s: of so many requests at once, median of three."
        ],
    )
    kept = Kept(report, json=json_path, markdown=markdown_path)
    outcomes = asyncio.run(_all(options, kept, console))
    kept.end(console, _verdicts(outcomes), _columns(options), [], "s")
    return all(outcome.not_run is None and outcome.facts["same"] for outcome in outcomes)


async def _all(options: Options, kept: Kept, console: Console) -> list[Outcome]:
    parts = [(MBALL, _mball)]
    if options.vllm is not None and options.peer:
        parts.append((STOCK, by_hand))
    outcomes = [Outcome(name) for name, _ in parts]
    with tempfile.TemporaryDirectory(prefix="mball-bench-") as folder:
        for outcome, (name, part) in zip(outcomes, parts, strict=True):

            def after(step: str, *, name: str = name) -> None:
                console.print(f"{name}: {step}", style="dim")
                kept.round(outcomes)

            try:
                await part(options, Path(folder), outcome, after)
            except (MballError, OSError) as error:
                outcome.not_run = str(error).replace("\n", " ")[-600:]
            kept.round(outcomes)
    return outcomes


async def _mball(options: Options, folder: Path, outcome: Outcome, after: Callable[[str], None]) -> None:
    if options.together:
        await both_at_once(options, folder, outcome, after)
    await in_turn(options, folder, outcome, after)


def _columns(options: Options) -> list[Column]:
    def spread(name: str) -> Callable[[Outcome], str]:
        return lambda outcome: str(Spread.of([r[name] for r in outcome.rounds if name in r] or [float("nan")]))

    def fact(name: str, digits: int = 2) -> Callable[[Outcome], str]:
        return lambda outcome: f"{outcome.facts[name]:.{digits}f}" if name in outcome.facts else ""

    return [
        Column("switch s", spread("switch_s")),
        Column("p95", lambda outcome: f"{p95(outcome):.2f}"),
        Column("sleep s", spread("sleep_s")),
        Column("wake s", spread("wake_s")),
        Column("first sleep", fact("first_sleep_s")),
        *(Column(f"tokens/s, {batch}", fact(f"tokens_{batch}", 1)) for batch in options.batches),
        Column("asleep GiB", lambda outcome: f"{outcome.facts.get('held_bytes', 0) / GiB:.2f}"),
        Column("started s", fact("ready_s", 1)),
    ]


def p95(outcome: Outcome) -> float:
    took = sorted(r["switch_s"] for r in outcome.rounds)
    return took[min(len(took) - 1, round(0.95 * len(took)))]


def _verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    ours = next((outcome for outcome in outcomes if outcome.name == MBALL and outcome.rounds), None)
    if ours is None:
        return []
    median = statistics.median(r["switch_s"] for r in ours.rounds)
    said = [
        f"MBALL's switch: median {median:.2f} s (wanted for 8B: {WANTED['switch_s']}), "
        f"p95 {p95(ours):.2f} s ({WANTED['p95']}), {len(ours.rounds)} of them."
    ]
    if "together_s" in ours.facts:
        said.append(
            f"Both asked for at once, with room for both: both answered after {ours.facts['together_s']:.1f} s."
        )
    stock = next((outcome for outcome in outcomes if outcome.name == STOCK and outcome.rounds), None)
    if stock is not None:
        said += [_against(ours.facts, stock.facts)]
    return said


def _against(ours: dict[str, Any], stock: dict[str, Any]) -> str:
    shares = [
        f"{name.removeprefix('tokens_')}: {ours[name] / stock[name]:.3f}"
        for name in ours
        if name in stock and name.startswith("tokens_")
    ]
    return f"Tokens/s against stock's by requests at once: {', '.join(shares)} (wanted: {WANTED['tokens']})."
