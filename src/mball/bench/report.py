"""A benchmark's result: a short table, JSON with every round, Markdown, a plot with its noise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mball.bench.runner import Outcome
from mball.errors import ConfigError

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is needed to judge a figure, or to make it again."""

    benchmark: str
    setting: dict[str, str]
    title: str
    command: str
    started: str
    machine: dict[str, str]
    versions: dict[str, str]
    subject: dict[str, str | int]
    outcomes: list[Outcome]
    notes: list[str]

    def outcome(self, name: str) -> Outcome | None:
        """The contender's, where it has rounds."""
        return next((outcome for outcome in self.outcomes if outcome.name == name and outcome.rounds), None)


def to_json(reports: Sequence[Report]) -> str:
    return (
        json.dumps({"schema_version": SCHEMA_VERSION, "reports": [asdict(report) for report in reports]}, indent=1)
        + "\n"
    )


def from_json(text: str) -> list[Report]:
    """Raises ConfigError for what `to_json` did not write."""
    try:
        parsed = json.loads(text)
        if parsed["schema_version"] != SCHEMA_VERSION:
            raise ConfigError(f"a result of schema {parsed['schema_version']}; this is {SCHEMA_VERSION}")
        return [
            Report(**{**found, "outcomes": [Outcome(**outcome) for outcome in found["outcomes"]]})
            for found in parsed["reports"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"not a benchmark's result: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, and the distance between the quartiles: the noise."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for no values. The noise of a single one is unknown, and given as 0."""
        if not values:
            raise ValueError("a spread of no values")
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
        return cls(statistics.median(values), high - low)

    def __str__(self) -> str:
        return f"{self.median:.2f} ± {self.iqr:.2f}"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table: a heading, and its text for an outcome that has rounds."""

    heading: str
    cell: Callable[[Outcome], str]


def table(report: Report, columns: Sequence[Column]) -> RenderableType:
    """What was timed, then the notes, then what was not timed and why."""
    shown = Table(title=report.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for column in columns:
        shown.add_column(column.heading, justify="right", no_wrap=True)
    for name, cells in _rows(report, columns):
        shown.add_row(name, *cells)
    not_run = [f"{outcome.name}: not run: {outcome.not_run}" for outcome in report.outcomes if outcome.not_run]
    return Group(shown, *(Text(note, style="dim") for note in report.notes), *(Text(line) for line in not_run))


def markdown(report: Report, columns: Sequence[Column], plot: str | None, *, level: int = 1) -> str:
    """A page for docs/benchmarks, or a section of one. `plot` is the image's path relative to the page."""
    lines = [f"{'#' * level} {report.title}", "", f"    {report.command}", ""]
    lines += [f"| | {' | '.join(column.heading for column in columns)} |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in _rows(report, columns)]
    lines += [""] + [f"{note}" for note in report.notes]
    lines += [f"{outcome.name} was not run: {outcome.not_run}." for outcome in report.outcomes if outcome.not_run]
    if plot is not None:
        lines += ["", f"![{report.title}]({plot})"]
    facts = {**report.subject, **report.machine, **report.versions, "started": report.started}
    lines += ["", "| what | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def plot(report: Report, stem: Path, series: Sequence[tuple[str, Callable[[Outcome], list[float]]]], unit: str) -> None:
    """Bars of medians with every round as a dot, to STEM.svg and STEM.png. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    timed = [outcome for outcome in report.outcomes if outcome.rounds and any(of(outcome) for _, of in series)][::-1]
    figure = Figure(figsize=(7.5, 0.9 + 0.55 * len(timed) * len(series)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(series)
    for number, (label, values_of) in enumerate(series):
        places = [row + (0.5 - number - 0.5 + (len(series) - 1) / 2) * height for row in range(len(timed))]
        found = [values_of(outcome) for outcome in timed]
        medians = [statistics.median(values) if values else 0.0 for values in found]
        axes.barh(places, medians, height * 0.9, label=label, color=f"C{number}", alpha=0.75)
        for place, median, values in zip(places, medians, found, strict=True):
            if not values:
                continue
            axes.plot(values, [place] * len(values), "o", color="black", markersize=3, alpha=0.6)
            end = (max(values), place)
            axes.annotate(f"{median:.2f}", end, (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(timed)), [outcome.name for outcome in timed])
    axes.set_xlabel(f"{unit} (dots: single rounds)")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_title(report.title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False, loc="best")
    for suffix in (".svg", ".png"):
        figure.savefig(stem.with_suffix(suffix), dpi=150)


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a report goes: JSON after every round, so that a run that is cut off leaves its rounds; the rest at the
    end. `plot` is the stem of an SVG and a PNG."""

    report: Report
    json: Path | None = None
    plot: Path | None = None
    markdown: Path | None = None

    def round(self, outcomes: list[Outcome]) -> None:
        self.report.outcomes[:] = outcomes
        if self.json is not None:
            self.json.write_text(to_json([self.report]))

    def end(
        self,
        console: Console,
        verdicts: Sequence[str],
        columns: Sequence[Column],
        series: Sequence[tuple[str, Callable[[Outcome], list[float]]]],
        unit: str,
    ) -> None:
        """The verdicts stand before the notes. Raises ImportError for a plot without matplotlib."""
        self.report.notes[:] = [*verdicts, *self.report.notes]
        self.round(list(self.report.outcomes))
        console.print(table(self.report, columns))
        if self.plot is not None:
            plot(self.report, self.plot, series, unit)
        if self.markdown is not None:
            name = f"{self.plot.name}.svg" if self.plot is not None else None
            self.markdown.write_text(markdown(self.report, columns, name))


def _rows(report: Report, columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    return [
        (outcome.name, [column.cell(outcome) for column in columns]) for outcome in report.outcomes if outcome.rounds
    ]
