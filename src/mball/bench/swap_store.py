"""`mball bench swap --store`: the swap store with all its checks, against the raw disk at its best depth."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from mball.bench import machine
from mball.bench.report import Column, Kept, Report, Spread
from mball.bench.runner import TIMEOUT_S, Contender, Outcome, merge, run
from mball.bench.swap_contenders import BLOCKS, IMAGE, Spec, is_raw, names, pattern
from mball.errors import ConfigError
from mball.swap import opening
from mball.swap.disk import reopened
from mball.swap.layout import SLOT_BYTES, Layout
from mball.units import GiB, MiB, format_bytes

WANTED = {"read": 0.93, "write": 0.90}
_CHUNK_BYTES = 64 * MiB


@dataclass(frozen=True, slots=True)
class Settings:
    """`folder` is on the disk to measure. `depths`: calls in flight of the raw contenders; `threads`: the store's."""

    folder: Path
    size_bytes: int = 2 * GiB
    slot_bytes: int = SLOT_BYTES
    depths: Sequence[int] = (1, 2, 4, 8, 16)
    threads: int = 8
    rounds: int = 5
    timeout_s: float = TIMEOUT_S

    def check(self) -> None:
        """Raises ConfigError."""
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is no folder")
        if not self.depths or min(self.depths) < 1:
            raise ConfigError(f"--depths: numbers above 0, not {self.depths}")
        if self.size_bytes < self.slot_bytes or self.size_bytes % self.slot_bytes:
            raise ConfigError(f"--size: a multiple of the slot's {format_bytes(self.slot_bytes)}")

    def command(self) -> str:
        words = ["mball", "bench", "swap", "--store", "--folder", "FOLDER", "--size", str(self.size_bytes)]
        words += ["--slot", str(self.slot_bytes), "--depths", ",".join(map(str, self.depths))]
        return shlex.join([*words, "--threads", str(self.threads), "--rounds", str(self.rounds)])


def run_store(
    settings: Settings,
    *,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    markdown_path: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Measure; print a table, write what is asked for, the JSON after every round.

    Raises ConfigError, SwapError; what fails is in the report, with the reason.
    """
    console = console or Console()
    settings.check()
    report = _report(settings)
    kept = Kept(report, json_path, plot_path, markdown_path)
    with console.status("writing the files once") as status, _contenders(settings) as contenders:
        outcomes: list[Outcome] = []
        for number in range(settings.rounds):
            # One round at a time: each process holds the data twice.
            turned = [*contenders[number % len(contenders) :], *contenders[: number % len(contenders)]]
            for contender in turned:
                status.update(f"round {number + 1} of {settings.rounds}: {contender.name}")
                merge(outcomes, run([contender], reference={}, rounds=1, timeout_s=settings.timeout_s))
            outcomes.sort(key=lambda outcome: names(settings.depths).index(outcome.name))
            kept.round(outcomes)
    series = [(way, lambda o, way=way: rates(o, way)) for way in WANTED]
    kept.end(console, verdicts(report), COLUMNS, series, "GiB/s")
    return report


def rates(outcome: Outcome, way: str) -> list[float]:
    """GiB/s of every round; `way` is read or write."""
    return [measures["bytes"] / GiB / measures[f"{way}_s"] for measures in outcome.rounds]


def best_raw(report: Report, way: str) -> Outcome | None:
    """The raw contender with the highest median."""
    raw = [outcome for outcome in report.outcomes if is_raw(outcome.name) and outcome.rounds]
    return max(raw, key=lambda outcome: Spread.of(rates(outcome, way)).median, default=None)


def verdicts(report: Report) -> list[str]:
    """What was wanted and what was reached, a line each."""
    lines = []
    for way, wanted in WANTED.items():
        best = best_raw(report, way)
        for name in (IMAGE, BLOCKS):
            mine = report.outcome(name)
            if best is None or mine is None:
                lines.append(f"{name}, {way}: not measured")
                continue
            share = Spread.of(rates(mine, way)).median / Spread.of(rates(best, way)).median
            reached = "reached" if share >= wanted else "not reached"
            lines.append(f"{name}, {way}: {share:.2f} × {best.name}; wanted {wanted:.2f}: {reached}")
    return lines


COLUMNS = [
    Column("read GiB/s", lambda outcome: str(Spread.of(rates(outcome, "read")))),
    Column("write GiB/s", lambda outcome: str(Spread.of(rates(outcome, "write")))),
]


def _report(settings: Settings) -> Report:
    return Report(
        benchmark="swap store",
        setting={"slot": str(settings.slot_bytes), "threads": str(settings.threads)},
        title=f"Swap store, {format_bytes(settings.size_bytes)} in slots of {format_bytes(settings.slot_bytes)}",
        command=settings.command(),
        started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe(),
        versions=machine.versions(("xxhash",)),
        subject={"bytes": settings.size_bytes, "slot bytes": settings.slot_bytes, "store threads": settings.threads},
        outcomes=[],
        notes=[
            "Median ± the quartiles' distance. Writing ends with a sync (the store: with its index on the disk, too); "
            "all files had been written to before. The store checks and hashes every byte both ways."
        ],
    )


@contextmanager
def _contenders(settings: Settings) -> Iterator[list[Contender]]:
    """Their files are on the disk, in full, and on a file system's first use no more."""
    with tempfile.TemporaryDirectory(prefix="mball-bench-", dir=settings.folder) as name:
        raw, store = Path(name) / "raw", Path(name) / "store"
        _write_once(raw, 0, settings.size_bytes)
        layout = _layout(settings)
        opening.acquire(store, size_bytes=layout.total_bytes, slot_bytes=settings.slot_bytes).close()
        _write_once(store, layout.slot_at(0), layout.total_bytes)
        yield [
            Contender(
                contender,
                Spec(
                    contender,
                    str(raw if is_raw(contender) else store),
                    settings.size_bytes,
                    settings.slot_bytes,
                    settings.threads,
                ).command(),
                compared=False,
            )
            for contender in names(settings.depths)
        ]


def _layout(settings: Settings) -> Layout:
    """With a few slots more than are written: the slots of the round before are free only after a snapshot."""
    return Layout(settings.slot_bytes, settings.size_bytes // settings.slot_bytes + 2)


def _write_once(path: Path, begin: int, end: int) -> None:
    content = pattern(_CHUNK_BYTES)
    with path.open("r+b" if path.exists() else "wb") as file:
        disk = reopened(file.fileno())
        try:
            for at in range(begin, end, _CHUNK_BYTES):
                disk.write([content[: end - at]], at)
            disk.sync()
        finally:
            disk.close()
