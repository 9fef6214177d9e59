"""What was measured of the allocator, as people read it."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console
from rich.table import Table

from mball.bench.allocator import Killed, Options, Switches, Together, killed, switches, together
from mball.bench.allocator_peers import vllm_together
from mball.bench.chaos_report import Check, write
from mball.bench.machine import describe, versions
from mball.units import GiB, format_bytes

SCHEMA = 1
KILLED_S = 3.0
KILLED_AFTER_SHOWN_S = 1.0
DELAYED = 1.25
"""A switch beside a start may take so much longer than alone: the two share the processor."""


def run_allocator(
    options: Options, *, vllm: Path | None, json_path: Path | None, markdown_path: Path | None, console: Console
) -> bool:
    """Whether every promise held. What is measured is written as soon as it is."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    results: dict[str, Any] = {}
    checks: list[Check] = []
    facts = {
        "schema": SCHEMA,
        "benchmark": "allocator",
        "machine": describe(options.device.partition("@")[0]),
        "versions": versions(["torch", "transformers", "vllm"]),
        "command": _command(options, vllm),
        "options": {key: str(value) for key, value in asdict(options).items()},
    }

    def add(name: str, found: Together | Killed | Switches, judged: list[Check]) -> None:
        results[name] = asdict(found)
        checks.extend(judged)
        if json_path is not None:
            body = {**facts, "checks": [vars(check) for check in checks], "results": results}
            write(json_path, json.dumps(body, indent=1))

    with console.status("models started at once"):
        at_once = asyncio.run(together(options))
        add("together", at_once, _of_together(at_once))
    with console.status("a worker killed"):
        deaths = asyncio.run(killed(options))
        add("killed", deaths, _of_killed(deaths))
    with console.status("switches"):
        turns = asyncio.run(switches(options, at_once.needed_bytes))
        add("switches", turns, _of_switches(turns))
    if vllm is not None:
        with console.status("vLLM"):
            stock = asyncio.run(vllm_together(options, vllm))
            add("vllm", stock, [_of_peer(stock)])
    table = Table("", "measured", "promised", "")
    for check in checks:
        table.add_row(check.name, check.measured, check.promised, _verdict(check, "[bold]does not[/]"))
    console.print(table)
    if markdown_path is not None:
        write(markdown_path, _markdown(facts, checks, options))
    return all(check.holds for check in checks)


def _command(options: Options, vllm: Path | None) -> str:
    words = ["mball", "bench", "allocator", options.model.name, options.large.name]
    words += ["--share", f"{options.share_bytes}", "--device", options.device]
    words += ["--kv", f"{options.kv_bytes}", "--dram", f"{options.dram_bytes}"]
    words += ["--kills", str(options.kills), "--switches", str(options.switches)]
    return shlex.join([*words, *(["--vllm", "PYTHON"] if vllm is not None else [])])


def _of_together(found: Together) -> list[Check]:
    return [
        Check(
            f"MBALL: {len(found.held_bytes)} models started at once: failed starts, or memory off its share",
            f"{found.collisions()}; all answered after {found.seconds:.1f} s",
            "0",
            found.collisions() == 0,
        )
    ]


def _of_peer(found: Together) -> Check:
    over = f", {format_bytes(found.over_bytes)} over its share" if found.over_bytes > 0 else ""
    measured = (
        f"{found.collisions()} ({len(found.failures)} failed{over}); the last was ready after {found.seconds:.0f} s"
    )
    # A peer's figure is shown, not judged.
    return Check(f"vLLM: {len(found.held_bytes)} servers started at once", measured, "", holds=True)


def _of_killed(found: Killed) -> list[Check]:
    worst, after = max(found.promised_s), max(found.after_s)
    count = f"worst of {len(found.promised_s)}"
    return [
        Check(
            f"a worker killed with {found.held_bytes / GiB:.1f} GiB: SIGKILL to bytes promised again",
            f"{worst:.2f} s, {count} (median {statistics.median(found.promised_s):.2f})",
            f"≤ {KILLED_S:.0f} s",
            worst <= KILLED_S,
        ),
        Check(
            "the same, from when the device shows them free",
            f"{after:.2f} s, {count} (median {statistics.median(found.after_s):.2f})",
            f"≤ {KILLED_AFTER_SHOWN_S:.0f} s",
            after <= KILLED_AFTER_SHOWN_S,
        ),
    ]


def _of_switches(found: Switches) -> list[Check]:
    beside = f"{statistics.median(found.beside_s):.2f} s, worst {max(found.beside_s):.2f}" if found.beside_s else "none"
    return [
        Check(
            f"a switch while another model starts ({found.start_s:.0f} s)",
            f"{beside}, of {len(found.beside_s)}; alone {statistics.median(found.alone_s):.2f} s "
            f"(worst {max(found.alone_s):.2f})",
            f"≤ {DELAYED} × alone",
            found.ratio <= DELAYED,
        )
    ]


def _verdict(check: Check, otherwise: str) -> str:
    return "" if not check.promised else "holds" if check.holds else otherwise


def _markdown(facts: dict[str, Any], checks: list[Check], options: Options) -> str:
    machine = "; ".join(f"{key}: {value}" for key, value in facts["machine"].items())
    used = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# The process allocator",
        "",
        f"`{facts['command']}`",
        "",
        f"{machine}. {used}.",
        "",
        "| what | measured | promised | |",
        "| --- | --- | --- | --- |",
        *(f"| {c.name} | {c.measured} | {c.promised} | {_verdict(c, '**does not hold**')} |" for c in checks),
        "",
        f"Each model that is started has a share of {format_bytes(options.share_bytes)}; a collision is a start that",
        "fails, or a process that ever holds more than its share. Two models that don't fit together take turns: a",
        "switch is from the request to its first token, the other model's way out included.",
        "",
    ]
    return "\n".join(lines)
