"""`mball bench simulate`: MBALL's policy against others' on one GPU with 24 models, over virtual time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mball.bench import machine, simulate_page
from mball.bench.report import Report, table, to_json
from mball.bench.runner import Outcome
from mball.bench.simulate_contest import (
    CONTENDERS,
    REPORT_SEEDS,
    TUNING_SEEDS,
    Contender,
    play_all,
    tune,
)
from mball.bench.simulate_fleet import (
    BUS_BYTES_S,
    CONTEXT_BYTES,
    DEVICE_BYTES,
    DISK_BYTES_S,
    DRAM_BYTES,
    TRACES,
    TUNED_ON,
    Traffic,
    fleet,
)
from mball.errors import ConfigError
from mball.memory.settings import Settings
from mball.units import GiB, format_bytes

_USUAL = Traffic()


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is simulated. `tuning`: every contender is tuned first; otherwise each has what won when it was last."""

    traces: Sequence[str] = tuple(TRACES)
    seeds: int = len(REPORT_SEEDS)
    rate: float = _USUAL.rate
    minutes: float = _USUAL.length_s / 60
    tuning: bool = False

    @property
    def traffic(self) -> Traffic:
        length_s = self.minutes * 60
        return Traffic(rate=self.rate, length_s=length_s, warm_s=min(_USUAL.warm_s, length_s / 5))

    @property
    def command(self) -> str:
        usual = Simulation()
        given = (
            ("--traces", ",".join(self.traces), ",".join(usual.traces)),
            ("--seeds", self.seeds, usual.seeds),
            ("--rate", self.rate, usual.rate),
            ("--minutes", self.minutes, usual.minutes),
        )
        words = [f"{option} {value}" for option, value, known in given if value != known]
        return " ".join(["mball bench simulate", *words, *(["--tune"] if self.tuning else [])])

    def check(self) -> None:
        """Raises ConfigError."""
        unknown = sorted(set(self.traces) - set(TRACES))
        if unknown or not self.traces:
            raise ConfigError(f"--traces: no {', '.join(unknown) or 'trace'} (there are {', '.join(TRACES)})")


def run_simulation(
    simulation: Simulation,
    *,
    json_path: Path | None,
    plot_path: Path | None,
    markdown_path: Path | None,
    console: Console,
) -> list[Report]:
    """Plays every contender on every trace and seed, shows the tables and writes what is asked for."""
    simulation.check()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    contenders = [_tuned(contender, simulation, console) for contender in CONTENDERS]
    reports = _reports(contenders, simulation, started, console)
    notes = _notes(reports, contenders, simulation)
    for report in reports:
        console.print(table(report, simulate_page.columns()))
    for note in notes:
        console.print(note, style="dim")
    if json_path is not None:
        json_path.write_text(to_json(reports))
    plot = plot_path or (markdown_path.with_suffix("") if markdown_path is not None else None)
    if plot is not None:
        simulate_page.draw(reports, plot)
    if markdown_path is not None and plot is not None:
        markdown_path.write_text(simulate_page.page(reports, notes, f"{plot.name}.svg"))
    return reports


def _tuned(contender: Contender, simulation: Simulation, console: Console) -> Contender:
    if not simulation.tuning or not contender.grid:
        return contender
    total = len(list(contender.choices())) * len(TUNED_ON) * len(TUNING_SEEDS)
    with _progress(console) as progress:
        task = progress.add_task(f"tuning {contender.name}", total=total)
        return tune(contender, simulation.traffic, TUNING_SEEDS, lambda done: progress.update(task, completed=done))


def _reports(contenders: Sequence[Contender], simulation: Simulation, started: str, console: Console) -> list[Report]:
    seeds = [REPORT_SEEDS[0] + number for number in range(simulation.seeds)]
    jobs = [
        (contender.name, contender.tuned, name, seed, simulation.traffic)
        for name in simulation.traces
        for contender in contenders
        for seed in seeds
    ]
    with _progress(console) as progress:
        task = progress.add_task("simulating", total=len(jobs))
        results = iter(play_all(jobs, lambda done: progress.update(task, completed=done)))
    return [
        Report(
            benchmark="simulate",
            setting={"trace": name},
            title=f"Trace {name}" + ("" if name in TUNED_ON else " (nobody was tuned on it)"),
            command=simulation.command,
            started=started,
            machine=machine.describe(),
            versions=machine.versions([]),
            subject=_subject(simulation),
            outcomes=[
                Outcome(contender.name, dict(contender.tuned), [next(results) for _ in seeds])
                for contender in contenders
            ],
            notes=[],
        )
        for name in simulation.traces
    ]


def _subject(simulation: Simulation) -> dict[str, str | int]:
    kinds, traffic = fleet(), simulation.traffic
    weights = format_bytes(sum(kind.weights_bytes for kind in kinds))
    return {
        "models": f"{len(kinds)}, 1B to 32B, {weights} of weights in all",
        "device": f"{format_bytes(DEVICE_BYTES)}; {format_bytes(CONTEXT_BYTES)} for each worker, asleep or awake",
        "DRAM for images": format_bytes(DRAM_BYTES),
        "image to device": f"{BUS_BYTES_S / GiB:.0f} GiB/s",
        "disk": f"{DISK_BYTES_S / GiB:.1f} GiB/s, one read after another",
        "a worker's start": f"{_range([kind.start_s for kind in kinds])}, two at once",
        "an answer": f"{_range([kind.service_s for kind in kinds])} on average",
        "requests": f"{traffic.rate:g} a second on average, {traffic.length_s / 60:.0f} minutes, "
        f"of which the first {traffic.warm_s / 60:.0f} do not count",
        "seeds": f"{REPORT_SEEDS[0]} to {REPORT_SEEDS[0] + simulation.seeds - 1}",
    }


def _range(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.1f} to {max(seconds):.1f} s"


def _notes(reports: Sequence[Report], contenders: Sequence[Contender], simulation: Simulation) -> list[str]:
    chosen = "; ".join(f"{contender.name}: {_named(contender.tuned) or 'as it is'}" for contender in contenders)
    grids = "; ".join(f"{contender.name}: {_named(contender.grid)}" for contender in contenders if contender.grid)
    return [
        *(str(verdict) for verdict in simulate_page.verdicts(reports)),
        *(simulate_page.bounds(report, Settings().swap_time_share) for report in reports),
        "Waits are from a request's arrival until its model lets it in. Means over the seeds, with 95 % bootstrap "
        "intervals; longest: of all seeds. The clairvoyant knows every request to come: a bound, not a rival.",
        f"Tuned for the lowest mean p99 on seeds {TUNING_SEEDS[0]} to {TUNING_SEEDS[-1]} of {', '.join(TUNED_ON)} "
        f"(mball bench simulate --tune), over {grids}. Chosen: {chosen}.",
    ]


def _named(values: Mapping[str, Any]) -> str:
    """`name 1/2, other no`."""

    def shown(value: object) -> str:
        if isinstance(value, tuple):
            return "/".join(shown(one) for one in value)
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else format(value, "g")

    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
    )
