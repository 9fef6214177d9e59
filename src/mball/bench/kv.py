"""`mball bench kv`: the time to the first token of a prompt whose KV is brought back, against computing it; and whether
the gate chooses the faster way."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from mball.bench import machine
from mball.bench.kv_contenders import CLEARLY, DRAM, STORE, Spec
from mball.bench.report import Column, Kept, Report, Spread
from mball.bench.runner import Contender, Outcome, run
from mball.errors import ConfigError
from mball.loader import Checkpoint
from mball.units import GiB, format_bytes

WANTED = {DRAM: 4.0, STORE: 2.0}
WRONG = 0.05
"""The share of wrong decisions that is allowed."""
_PACKAGES = ("torch", "transformers", "cuda-bindings", "xxhash")


@dataclass(frozen=True, slots=True)
class Settings:
    """`stores`: folders on the disks to measure; `disk_rate`: bytes a second that one more store in the first of them
    reads at most. Each length and way is measured `repeats` times in a process, in `rounds` processes."""

    device: str = "cpu"
    tokens: int = 8000
    stores: Sequence[Path] = ()
    disk_rate: float | None = None
    repeats: int = 5
    rounds: int = 2
    timeout_s: float = 900.0

    def check(self) -> None:
        """Raises ConfigError."""
        if self.tokens < 64:
            raise ConfigError(f"--tokens: 64 at least, not {self.tokens}")
        if missing := [str(folder) for folder in self.stores if not folder.is_dir()]:
            raise ConfigError(f"--store: {', '.join(missing)}: no such folder")
        if self.disk_rate is not None and (self.disk_rate <= 0 or not self.stores):
            raise ConfigError("--disk-rate: above 0, and of a --store")

    def command(self, model: Path) -> str:
        words = ["mball", "bench", "kv", str(model), "--device", self.device, "--tokens", str(self.tokens)]
        for folder in self.stores:
            words += ["--store", str(folder)]
        if self.disk_rate is not None:
            words += ["--disk-rate", str(int(self.disk_rate))]
        return shlex.join([*words, "--repeats", str(self.repeats), "--rounds", str(self.rounds)])

    def contenders(self, model: Path) -> list[Contender]:
        device = "cuda:0" if self.device == "cuda" else self.device

        def contender(name: str, source: str, folder: Path | None = None, rate: float | None = None) -> Contender:
            where = None if folder is None else str(folder.absolute())
            spec = Spec(source, str(model), device, self.tokens, self.repeats, where, rate)
            return Contender(name, spec.command(), compared=False)

        found = [contender(DRAM, DRAM)]
        found += [contender(f"{STORE} in {folder}", STORE, folder) for folder in self.stores]
        if self.disk_rate is not None:
            rate = f"{self.disk_rate / GiB:.2g} GiB/s"
            found.append(contender(f"{STORE} held to {rate}", STORE, self.stores[0], self.disk_rate))
        return found


def run_kv(
    model_path: Path,
    settings: Settings,
    *,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    markdown_path: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Measure; print a table, write what is asked for, the JSON after every round.

    Raises ConfigError, CheckpointError; what fails is in the report, with the reason.
    """
    console = console or Console()
    settings.check()
    report = _report(model_path, Checkpoint.open(model_path), settings)
    kept = Kept(report, json_path, plot_path, markdown_path)
    with console.status("starting") as status:
        kept.round(
            run(
                settings.contenders(model_path),
                reference={},
                rounds=settings.rounds,
                timeout_s=settings.timeout_s,
                progress=status.update,
                after_round=kept.round,
            )
        )
    series = [(mode, lambda o, mode=mode: _of(o, f"{mode}_s", 1e3)) for mode in ("computed", "restored", "gate")]
    kept.end(console, verdicts(report), COLUMNS, series, "ms to the first token")
    return report


def ratio(outcome: Outcome) -> float:
    """How many times as fast as computing."""
    computed, restored = _of(outcome, "computed_s"), _of(outcome, "restored_s")
    return Spread.of([c / r for c, r in zip(computed, restored, strict=True)]).median


def verdicts(report: Report) -> list[str]:
    """What was wanted and what was reached, a line each."""
    lines = []
    for outcome in report.outcomes:
        if not outcome.rounds:
            continue
        wanted, times = WANTED[outcome.name.partition(" ")[0]], ratio(outcome)
        admitted = sum(_of(outcome, "admitted")) / len(outcome.rounds)
        says = "admits" if admitted > 0.5 else "refuses"
        right = "right" if (times > 1) is (admitted > 0.5) or max(times, 1 / times) < CLEARLY else "wrong"
        lines.append(
            f"{outcome.name}: brought back {times:.2f} × as fast as computed (wanted of fast ones: {wanted:.0f}); "
            f"the gate {says}, which is {right}."
        )
    wrong, decisions = (sum(sum(_of(o, name)) for o in report.outcomes) for name in ("wrong", "decisions"))
    if decisions:
        reached = "reached" if wrong <= WRONG * decisions else "not reached"
        share = f"{wrong / decisions:.1%} (wanted {WRONG:.0%}: {reached})"
        lines.append(f"{wrong:.0f} of {decisions:.0f} decisions were wrong: {share}.")
    return lines


def _of(outcome: Outcome, measure: str, scale: float = 1.0) -> list[float]:
    return [measures[measure] * scale for measures in outcome.rounds]


def _ms(measure: str) -> Column:
    return Column(f"{measure}, ms", lambda outcome: str(Spread.of(_of(outcome, f"{measure}_s", 1e3))))


COLUMNS = (
    _ms("computed"),
    _ms("restored"),
    _ms("gate"),
    Column("× computed", lambda outcome: f"{ratio(outcome):.2f}"),
    Column("gate admits", lambda outcome: f"{sum(_of(outcome, 'admitted')) / len(outcome.rounds):.0%}"),
    Column("wrong", lambda outcome: f"{sum(_of(outcome, 'wrong')):.0f} of {sum(_of(outcome, 'decisions')):.0f}"),
)


def _report(model_path: Path, checkpoint: Checkpoint, settings: Settings) -> Report:
    return Report(
        benchmark="kv",
        setting={"device": settings.device, "tokens": str(settings.tokens)},
        title=f"The first token after a prompt of {settings.tokens} tokens, its KV computed or brought back",
        command=settings.command(Path(model_path.name)),
        started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe("cuda:0" if settings.device != "cpu" else "cpu"),
        versions=machine.versions(_PACKAGES),
        subject={"weights": format_bytes(checkpoint.nbytes), "tokens": settings.tokens},
        outcomes=[],
        notes=[
            "From the request to its first token, one sequence; computed and restored: the gate forced shut and open. "
            "The three in turn, the pool emptied before each (and the arena, where it comes from a store). The token "
            "and its log probability are those with the KV in the pool, to the bit.",
            "Decisions: of the whole prompt and a half, quarter, eighth and sixteenth of it; wrong where the other way "
            f"is {CLEARLY - 1:.0%} faster, and faster each time.",
        ],
    )
