"""How results of `mball bench simulate` are shown: intervals, a verdict, tables, a plot, a page."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mball.bench.report import Column, Report, markdown
from mball.bench.runner import Outcome
from mball.bench.simulate_contest import CLAIRVOYANT, MBALL

_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds, and where it lies in 95 of 100 draws of as many seeds from these."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Raises ValueError for no values."""
        if not values:
            raise ValueError("an interval of no values")
        rng = random.Random(0)
        means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(_DRAWS))
        return cls(statistics.fmean(values), means[int(0.025 * _DRAWS)], means[int(0.975 * _DRAWS)])

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f}–{self.high:.1f})"


@dataclass(frozen=True, slots=True)
class Against:
    """MBALL's p99 beside a rival's: the ratio of their means by trace, and over all traces."""

    rival: str
    by_trace: dict[str, float]
    overall: float

    @property
    def won(self) -> bool:
        """Ahead on average, and on no trace worse by more than a twentieth."""
        return self.overall < 1.0 and max(self.by_trace.values()) <= 1.05

    def __str__(self) -> str:
        traces = ", ".join(f"{name} {ratio:.2f}" for name, ratio in self.by_trace.items())
        verdict = "ahead" if self.won else "NOT ahead"
        return f"p99 against {self.rival}: × {self.overall:.2f} on average ({traces}): {verdict}."


def values(outcome: Outcome, measure: str) -> list[float]:
    return [found[measure] for found in outcome.rounds]


def verdicts(reports: Sequence[Report]) -> list[Against]:
    """MBALL against each online rival; the average is over traces, of ratios, so that no trace outweighs another."""
    names = [o.name for o in reports[0].outcomes if o.name not in (MBALL, CLAIRVOYANT)] if reports else []
    found = []
    for name in names:
        ratios = {}
        for report in reports:
            ours, theirs = report.outcome(MBALL), report.outcome(name)
            if ours is not None and theirs is not None:
                ratios[report.setting["trace"]] = statistics.fmean(values(ours, "p99_s")) / statistics.fmean(
                    values(theirs, "p99_s")
                )
        if ratios:
            found.append(Against(name, ratios, statistics.geometric_mean(ratios.values())))
    return found


def columns() -> list[Column]:
    def interval(measure: str) -> Column:
        heading = {"mean_s": "mean wait, s", "p99_s": "p99 wait, s"}[measure]
        return Column(heading, lambda outcome: str(Interval.of(values(outcome, measure))))

    def average(heading: str, measure: str, form: str) -> Column:
        return Column(heading, lambda outcome: format(statistics.fmean(values(outcome, measure)), form))

    return [
        interval("mean_s"),
        interval("p99_s"),
        Column("longest", lambda outcome: f"{max(values(outcome, 'longest_s')):.0f}"),
        average("switch", "switching_share", ".0%"),
        average("moves", "promotions", ".0f"),
    ]


def bounds(report: Report, share: float) -> str:
    """MBALL's switching and longest wait beside what its rules bound them to."""
    ours = report.outcome(MBALL)
    if ours is None:
        return ""
    switching = max(values(ours, "switching_share"))
    longest = max(ours.rounds, key=lambda found: found["longest_s"] / found["longest_bound_s"])
    within = switching <= share and longest["longest_s"] <= longest["longest_bound_s"]
    return (
        f"{report.setting['trace']}: MBALL switches {switching:.1%} of the time at most (bound {share:.0%}); its "
        f"longest wait nearest to its bound is {longest['longest_s']:.0f} s of {longest['longest_bound_s']:.0f} s: "
        f"{'within both' if within else 'NOT within'}."
    )


def draw(reports: Sequence[Report], stem: Path) -> None:
    """Mean and p99 by trace, with intervals, to STEM.svg and STEM.png. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    names = [outcome.name for outcome in reports[0].outcomes]
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    for axes, (measure, title) in zip(
        figure.subplots(2, 1, sharex=True), (("mean_s", "mean wait"), ("p99_s", "p99 wait")), strict=True
    ):
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            found = [outcome for report in reports for outcome in report.outcomes if outcome.name == name]
            spreads = [Interval.of(values(outcome, measure)) for outcome in found]
            places = [row + (number - (len(names) - 1) / 2) * width for row in range(len(reports))]
            errors = [[s.mean - s.low for s in spreads], [s.high - s.mean for s in spreads]]
            axes.bar(places, [s.mean for s in spreads], width * 0.92, yerr=errors, capsize=2, label=name, alpha=0.8)
        axes.set_ylabel(f"{title}, s")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(range(len(reports)), [report.setting["trace"] for report in reports])
    figure.axes[0].legend(fontsize=8, frameon=False, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    for suffix in (".svg", ".png"):
        figure.savefig(stem.with_suffix(suffix), dpi=150)


def page(reports: Sequence[Report], notes: Sequence[str], plot: str | None) -> str:
    """One page: what was simulated, the verdicts, a table for each trace."""
    first = reports[0]
    lines = ["# Simulated: 24 models on one GPU", "", f"    {first.command}", ""]
    lines += [f"{note}\n" for note in notes]
    if plot is not None:
        lines += [f"![Waits by trace]({plot})", ""]
    lines += ["| what | value |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in {**first.subject, **first.machine, **first.versions}.items()]
    for report in reports:
        section = markdown(report, columns(), None, level=2)
        lines += ["", section[: section.index("\n| what | value |")].replace(f"    {report.command}\n\n", "").rstrip()]
    return "\n".join(lines) + "\n"
