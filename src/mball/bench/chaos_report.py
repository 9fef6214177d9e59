"""A chaos run as people read it, and whether it holds what is promised."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mball.bench.chaos import PHASES, Result
from mball.bench.machine import describe

SCHEMA = 1


@dataclass(frozen=True)
class Check:
    """One promise: what was measured, what was promised, and whether it holds."""

    name: str
    measured: str
    promised: str
    holds: bool


def checks(result: Result, *, requests: int, swaps: int) -> list[Check]:
    drift = result.rss_drift
    untold = sorted(set(result.outcomes) - {"ok", "lost", "refused", "error event", "wrong"})
    missed = [phase for phase in PHASES if not result.faults[phase]]
    return [
        Check("requests", str(result.requests), f"≥ {requests}", result.requests >= requests),
        Check("swaps", str(result.swaps), f"≥ {swaps}", result.swaps >= swaps),
        Check("killed", f"{sum(result.faults.values())}", "in every phase", not missed),
        Check("one outcome each", ", ".join(untold) or "all", "all", not untold),
        Check(
            "200 at once, of those not on a killed worker", f"{result.at_once:.2%}", "≥ 99 %", result.at_once >= 0.99
        ),
        Check("200 after one Retry-After", f"{result.after_one_retry:.2%}", "100 %", result.after_one_retry == 1.0),
        Check("wrong answers", str(len(result.wrong)), "0", not result.wrong),
        Check(
            "manager's memory from the 100th swap on",
            "too few swaps" if drift is None else f"{drift:+.2%}",
            "< 2 %",
            drift is None or drift < 0.02,
        ),
        Check("device over-committed", str(result.refusals), "0 times", not result.refusals),
        Check("books wrong", str(result.broken_books), "0 times", not result.broken_books),
        Check("processes left", str(result.orphans), "0", not result.orphans),
    ]


def to_json(result: Result, found: list[Check], command: str) -> str:
    return json.dumps(
        {
            "schema": SCHEMA,
            "benchmark": "chaos",
            "machine": describe(),
            "command": command,
            "checks": [vars(check) for check in found],
            **result.as_dict(),
        },
        indent=2,
        ensure_ascii=False,
    )


def to_markdown(result: Result, found: list[Check], command: str) -> str:
    lines = [
        "# Chaos",
        "",
        f"`{command}` ({result.seconds:.0f} s)",
        "",
        "Clients ask for more models than the device holds, while workers are killed at every step of their lives,",
        "some are stopped so that they hang, and those of one model say they gave their memory back and have not.",
        "Each answer is compared with what the model says alone.",
        "",
        "| what | measured | promised | |",
        "| --- | --- | --- | --- |",
        *(f"| {c.name} | {c.measured} | {c.promised} | {'holds' if c.holds else '**does not hold**'} |" for c in found),
        "",
        "| phase | killed | hung |",
        "| --- | --- | --- |",
        *(f"| {phase} | {result.faults[phase]} | {result.hangs[phase]} |" for phase in PHASES),
        "",
        "| outcome | first try | after its Retry-After |",
        "| --- | --- | --- |",
        *(
            f"| {outcome} | {result.outcomes[outcome]} | {result.later[outcome]} |"
            for outcome in sorted({*result.outcomes, *result.later})
        ),
        "",
        f"Workers started {result.starts} times, {result.crashes} ends counted as crashes.",
        "",
        "Outcomes: `ok` is a whole 200 with the right text; `lost` a 503 with Retry-After, or an error event in the",
        "stream, as its worker ended while it answered; `refused` a 503 with Retry-After for another reason.",
        "",
    ]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + ("" if text.endswith("\n") else "\n"))
