"""How results of `mball bench load` are shown: columns, notes, plots, and a page of several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from mball.bench.baselines import BASELINES
from mball.bench.report import Column, Report, Spread, markdown, plot
from mball.bench.runner import Outcome
from mball.bench.targets import TARGETS, Results
from mball.units import GiB, MiB, format_bytes

_PROCESSES = (
    "Every process is fresh, all of a round start together and then work one at a time, in an order that turns every "
    "round. Each contender's result of the first round was compared bit for bit with what safetensors reads; a wrong "
    "one has no figures. Median ± distance of the quartiles over the rounds."
)
_CPU = (
    "safetensors is load_file, transformers is from_pretrained (which builds the module too), both with a clone of "
    "each tensor, as the tensors that they return are pages of the file and change with it. In file: bytes of the "
    "result that still are. Peak: of the process, above its start."
)
_GPU = (
    "The clock runs from the call to the last synchronised byte, in a process that has a CUDA context and nothing "
    "else. Beyond: the GPU memory taken at the peak beside the weights. Host: memory taken at the peak beyond the "
    "page cache, by the whole machine, memory pinned by the driver among it; private: the process's own part. Both in "
    "the first call. Of the bus: against pinned memory copied to the GPU in 16 MiB chunks in the same rounds."
)
_PEERS = (
    "Peers have their defaults, but fastsafetensors and instanttensor read through the page cache where that is what "
    "is measured (by default they go around it). transformers is from_pretrained, which builds the module; so does "
    "“mball, module”, the one that MBALL's engine serves."
)

_INTRODUCTION = (
    "Medians over the rounds that the last column of each table counts: a run that was cut off has fewer than its "
    "command asked for, and fewer than five are a sign rather than a result. The first table is made from the others; "
    "what was wanted is for one H100."
)

NOTES: dict[tuple[str, str], list[str]] = {
    ("warm", "CPU"): [
        "From the page cache into the CPU's memory. First: the first call in a process, after as much memory was "
        f"touched and freed; steady: the second call. {_PROCESSES}",
        _CPU,
    ],
    ("image", "CPU"): [
        f"From a sealed memfd into the CPU's memory, the module being there already. {_PROCESSES}",
        _CPU,
    ],
    ("cold", "CPU"): [f"Each from a copy of its own, none of it in the page cache (by mincore). {_PROCESSES}", _CPU],
    ("warm", "GPU"): [f"First: the first call in a process; steady: the second. {_PROCESSES}", _GPU, _PEERS],
    ("image", "GPU"): [
        "From a sealed memfd, the module being there already: as a model comes back. First: the image is registered "
        f"with the driver within the call; steady: it is already. {_PROCESSES}",
        _GPU,
    ],
    ("cold", "GPU"): [
        f"Each from a copy of its own, none of it in the page cache before (by mincore). {_PROCESSES}",
        _GPU,
        "The raw reads, 16 in flight, are from copies of their own too, in every round.",
        _PEERS,
    ],
}


def rates(measure: str) -> Callable[[Outcome], list[float]]:
    """GiB/s of every round that has the measure."""
    return lambda outcome: [
        measures["bytes"] / GiB / measures[measure] for measures in outcome.rounds if measure in measures
    ]


def columns_of(report: Report) -> list[Column]:
    return _cpu_columns(report) if report.setting["device"] == "cpu" else _gpu_columns(report)


def draw(reports: Sequence[Report], stem: Path, console: Console | None = None) -> dict[int, Path]:
    """STEM.svg and STEM.png, or STEM-1 … where there are several; the SVGs by the report's number. None of them
    without matplotlib."""
    drawn: dict[int, Path] = {}
    for number, report in enumerate(reports):
        own = stem if len(reports) == 1 else stem.with_name(f"{stem.name}-{number + 1}")
        series = [("first call", rates("first_s"))]
        if any(rates("steady_s")(outcome) for outcome in report.outcomes):
            series.append(("steady", rates("steady_s")))
        try:
            plot(report, own, series, "GiB/s")
        except ImportError:
            if console is not None:
                console.print("no plot: matplotlib is not installed (pip install 'mball[bench]')")
            return {}
        drawn[number] = own.with_suffix(".svg")
    return drawn


def page(reports: Sequence[Report], plots: Mapping[int, Path], folder: Path) -> str:
    """Markdown: what was to be reached and what was, then a section a report. Image paths are relative to `folder`."""
    places = {number: os.path.relpath(path, folder) for number, path in plots.items()}
    if len(reports) == 1:
        return markdown(reports[0], columns_of(reports[0]), places.get(0))
    results = Results(reports)
    rows = [(target, results.judge(target)) for target in TARGETS]
    lines = ["# Loading weights", "", _INTRODUCTION, "", "| figure | wanted | reached | |", "| --- | --- | --- | --- |"]
    lines += [f"| {target.figure} | {target.wanted} | {text} | {verdict} |" for target, (text, verdict) in rows]
    sections = [
        markdown(report, columns_of(report), places.get(number), level=2) for number, report in enumerate(reports)
    ]
    return "\n".join([*lines, "", *sections])


def _cpu_columns(report: Report) -> list[Column]:
    reference = report.outcome("safetensors")
    columns = [_rate("first, GiB/s", "first_s"), _ratio("first_s", reference)]
    if report.setting["state"] != "cold":
        columns += [_rate("steady, GiB/s", "steady_s"), _ratio("steady_s", reference)]
    return [
        *columns,
        _bytes("peak", "peak_bytes"),
        Column("in file", lambda outcome: format_bytes(outcome.facts.get("file_backed_bytes", 0))),
    ]


def _gpu_columns(report: Report) -> list[Column]:
    bus = next((outcome for name in BASELINES if name.startswith("bus") and (outcome := report.outcome(name))), None)
    columns = [_seconds("first, s", "first_s"), _rate("first, GiB/s", "first_s")]
    if report.setting["state"] != "cold":
        columns += [_rate("steady, GiB/s", "steady_s"), _share("of the bus", "steady_s", bus)]
    return [
        *columns,
        _bytes("beyond", "vram_extra_bytes"),
        _bytes("host", "host_bytes"),
        _bytes("private", "private_bytes"),
        Column("rounds", lambda outcome: str(len(outcome.rounds))),
    ]


def _rate(heading: str, measure: str) -> Column:
    def cell(outcome: Outcome) -> str:
        found = rates(measure)(outcome)
        return str(Spread.of(found)) if found else "–"

    return Column(heading, cell)


def _seconds(heading: str, measure: str) -> Column:
    def cell(outcome: Outcome) -> str:
        return f"{Spread.of([measures[measure] for measures in outcome.rounds]).median:.3f}"

    return Column(heading, cell)


def _quotient(measure: str, outcome: Outcome, other: Outcome | None) -> float | None:
    mine, theirs = rates(measure)(outcome), rates(measure)(other) if other is not None else []
    return Spread.of(mine).median / Spread.of(theirs).median if mine and theirs else None


def _ratio(measure: str, reference: Outcome | None) -> Column:
    def cell(outcome: Outcome) -> str:
        found = _quotient(measure, outcome, reference)
        return f"{found:.2f} ×" if found is not None else "–"

    return Column("", cell)


def _share(heading: str, measure: str, bus: Outcome | None) -> Column:
    def cell(outcome: Outcome) -> str:
        found = _quotient(measure, outcome, bus)
        return f"{found:.0%}" if found is not None else "–"

    return Column(heading, cell)


def _bytes(heading: str, measure: str) -> Column:
    def cell(outcome: Outcome) -> str:
        found = [measures[measure] for measures in outcome.rounds if measure in measures]
        if not found:
            return "–"
        median = Spread.of(found).median
        return format_bytes(round(median)) if median >= MiB else f"{median / MiB:.1f} MiB"

    return Column(heading, cell)
