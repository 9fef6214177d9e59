"""`mball bench gateway`: what the gateway costs a request, beside the LiteLLM proxy and the worker called directly."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from mball.bench import machine
from mball.bench.gateway_contenders import Spec, reference
from mball.bench.gateway_servers import BARE, DIRECT, LITELLM, MBALL
from mball.bench.report import Column, Kept, Report, Spread
from mball.bench.runner import TIMEOUT_S, Contender, Outcome, merge, rotated, run
from mball.errors import ConfigError

_CORES = 2
TIMES = {"json_1_rps": 12, "json_32_rps": 30, "stream_1_rps": 50, "stream_32_rps": 50}
"""Of LiteLLM's requests/s, at the least."""
MOST = {
    "added_p50_ms": 0.4,
    "added_p99_ms": 1.5,
    "first_p50_ms": 1.0,
    "first_p99_ms": 2.5,
    "stream_kib": 50.0,
    "growth_mib": 1.0,
}
NAMES = {
    "json_1_rps": "JSON, 1 connection",
    "json_32_rps": "JSON, 32 connections",
    "stream_1_rps": "streams, 1 connection",
    "stream_32_rps": "streams, 32 connections",
    "added_p50_ms": "added, p50, ms",
    "added_p99_ms": "added, p99, ms",
    "first_p50_ms": "first byte later, p50, ms",
    "first_p99_ms": "first byte later, p99, ms",
    "stream_kib": "KiB an open stream",
    "growth_mib": "MiB more after many requests",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """`litellm`: a folder with a venv of it, made where it is not; None: without. The rest is as in Spec."""

    litellm: Path | None = None
    seconds: float = 4.0
    windows: int = 5
    rate: float = 200.0
    streams: int = 1000
    growth: int = 20_000
    rounds: int = 3
    timeout_s: float = TIMEOUT_S

    def check(self) -> None:
        """Raises ConfigError."""
        if self.windows < 1 or self.seconds <= 0 or self.rate <= 0:
            raise ConfigError("--windows, --seconds and --rate: numbers above 0")

    def command(self) -> str:
        words = ["mball", "bench", "gateway", "--seconds", f"{self.seconds:g}", "--windows", str(self.windows)]
        words += ["--rate", f"{self.rate:g}", "--streams", str(self.streams), "--growth", str(self.growth)]
        words += ["--rounds", str(self.rounds), *([] if self.litellm else ["--no-litellm"])]
        return shlex.join(words)

    def specs(self) -> list[Spec]:
        mine = Spec(MBALL, "", self.seconds, self.windows, self.rate, self.rate / 4, self.streams, self.growth)
        found = [replace(mine, contender=DIRECT), mine, replace(mine, contender=BARE, streams=0, growth=0)]
        if self.litellm is not None:
            # As many streams, or requests, would take it many minutes.
            peer = replace(mine, contender=LITELLM, streams=self.streams // 10, growth=0, windows=1)
            found.append(replace(peer, venv=str(self.litellm.absolute())))
        return found


def run_gateway(
    settings: Settings,
    *,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    markdown_path: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Measure on two cores; print a table, write what is asked for, the JSON after every round.

    Raises ConfigError; what fails is in the report, with the reason.
    """
    console = console or Console()
    settings.check()
    cores = os.sched_getaffinity(0)
    report = _report(settings)
    kept = Kept(report, json_path, plot_path, markdown_path)
    contenders = [Contender(spec.contender, spec.command()) for spec in settings.specs()]
    order = [contender.name for contender in contenders]
    outcomes: list[Outcome] = []
    os.sched_setaffinity(0, sorted(cores)[:_CORES])
    try:
        with console.status("") as status:
            for number in range(settings.rounds):
                for contender in rotated(contenders, number):
                    status.update(f"round {number + 1} of {settings.rounds}: {contender.name}")
                    merge(outcomes, run([contender], reference=reference(), rounds=1, timeout_s=settings.timeout_s))
                outcomes.sort(key=lambda outcome: order.index(outcome.name))
                kept.round(outcomes)
    finally:
        os.sched_setaffinity(0, cores)
    series = [(NAMES[name], _proxied(name)) for name in TIMES]
    kept.end(console, verdicts(report), COLUMNS, series, "requests/s")
    return report


def verdicts(report: Report) -> list[str]:
    """What was wanted and what was reached, a line each."""
    mine, peer = report.outcome(MBALL), report.outcome(LITELLM)
    lines = []
    for name, wanted in TIMES.items():
        if mine is None or peer is None:
            lines.append(f"{NAMES[name]}: not compared")
            continue
        times = median(mine, name) / median(peer, name)
        reached = "reached" if times >= wanted else "not reached"
        lines.append(f"{NAMES[name]}: {times:.0f} × LiteLLM; wanted {wanted} ×: {reached}")
    for name, most in MOST.items():
        if mine is None or not values(mine, name):
            lines.append(f"{NAMES[name]}: not measured")
            continue
        found = median(mine, name)
        reached = "reached" if found <= most else "not reached"
        lines.append(f"{NAMES[name]}: {found:.2f}; wanted at most {most:g}: {reached}")
    bare, those = report.outcome(BARE), [name for name in MOST if name.endswith("_ms")]
    if bare is not None and all(values(bare, name) for name in those):
        said = ", ".join(f"{NAMES[name]}: {median(bare, name):.2f}" for name in those)
        lines.append(f"of a uvicorn that forwards and does nothing else, {said}")
    direct = report.outcome(DIRECT)
    if mine is not None and direct is not None:
        added_ms = 1000 / median(mine, "json_1_rps") - 1000 / median(direct, "json_1_rps")
        lines.append(f"added on one connection that asks without a pause: {added_ms:.2f} ms")
    return lines


def values(outcome: Outcome, name: str) -> list[float]:
    return [measures[name] for measures in outcome.rounds if name in measures]


def median(outcome: Outcome, name: str) -> float:
    return Spread.of(values(outcome, name)).median


def _proxied(name: str) -> Callable[[Outcome], list[float]]:
    """The worker itself would dwarf what is compared."""
    return lambda outcome: [] if outcome.name == DIRECT else values(outcome, name)


def _column(name: str) -> Column:
    def cell(outcome: Outcome) -> str:
        found = values(outcome, name)
        if not found:
            return "–"
        spread = Spread.of(found)
        return f"{spread.median:,.0f} ± {spread.iqr:,.0f}" if name in TIMES else str(spread)

    return Column(NAMES[name], cell)


COLUMNS: Sequence[Column] = [_column(name) for name in NAMES]


def _report(settings: Settings) -> Report:
    return Report(
        benchmark="gateway",
        setting={"rate": f"{settings.rate:g}"},
        title="The gateway, over a worker that answers at once",
        command=settings.command(),
        started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe(),
        versions=machine.versions(("uvicorn", "uvloop", "httptools", "starlette", "fastapi")),
        subject={"cores": _CORES, "open streams": settings.streams, "requests of the growth": settings.growth},
        outcomes=[],
        notes=[
            "Worker, gateway and load generator share two cores; requests/s of connections that ask again once they "
            "are answered. A stream has 64 chunks, each a write of the worker's own. MBALL has ten keys, limits, "
            "metrics, admission and logs on; LiteLLM has a master key; each is one process.",
            f"Added: to the time of a JSON answer at {settings.rate:g} requests/s, and later: to the first byte of a "
            f"stream paced at 10 ms a chunk at {settings.rate / 4:g} a second, both against the worker called directly "
            f"in a window beside it; the median of {settings.windows} windows ({settings.seconds:g} s each). LiteLLM "
            "has none where it can't answer so many. Open streams: of LiteLLM a tenth as many.",
        ],
    )
