"""`mball bench load`: how fast a model's weights come from the page cache into memory that the tensors own."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from mball.bench import machine
from mball.bench.contenders import LOADERS, Spec
from mball.bench.report import Column, Report, Spread, markdown, plot, table
from mball.bench.runner import Contender, Outcome, run
from mball.errors import ConfigError
from mball.loader import Checkpoint
from mball.units import GiB, MiB, format_bytes

PEERS = ("safetensors", "transformers")
_REFERENCE = "safetensors"
_PACKAGES = ("mball", "torch", "safetensors", "transformers")
_NOTES = [
    "From the page cache into the CPU's memory. Every process is fresh, and its results were compared with those of "
    "safetensors before. First: the first call in a process, after as much memory was touched and freed; steady: the "
    "second call. Median ± distance of the quartiles over the rounds.",
    "safetensors is load_file, transformers is from_pretrained (which builds the module too), both with a clone of "
    "each tensor, as the tensors that they return are pages of the file and change with it. In file: bytes of the "
    "result that still are. Peak: of the process, above its start.",
]


def run_load(
    model_path: Path,
    *,
    rounds: int = 5,
    peers: Sequence[str] = PEERS,
    threads: int | None = None,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    markdown_path: Path | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> Report:
    """Time MBALL's loader against its peers on one model; print a table, write what is asked for.

    `plot_path` gives the stem of an SVG and a PNG. Raises ConfigError for an unknown peer, CheckpointError for a
    model that can't be opened; a contender that fails is in the report, with the reason.
    """
    console = console or Console()
    unknown = sorted(set(peers) - set(LOADERS))
    if unknown:
        raise ConfigError(f"--peers: no such peer: {', '.join(unknown)} (there are {', '.join(PEERS)})")
    checkpoint = Checkpoint.open(model_path)
    threads = threads or min(8, len(os.sched_getaffinity(0)))
    names = [name for name in LOADERS if name == "mball" or name in peers]
    ran_on = machine.describe()
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with console.status("starting") as status:
        outcomes = run(
            [_contender(name, model_path, threads) for name in names],
            rounds=rounds,
            before_each=lambda: warm(checkpoint),
            progress=lambda step: status.update(step),
        )
    report = Report(
        benchmark="load",
        title=f"Load {format_bytes(checkpoint.nbytes)} from the page cache, CPU",
        command=command
        or f"mball bench load {shlex.quote(str(model_path))} --rounds {rounds} --peers {','.join(peers)}",
        started=started,
        machine=ran_on,
        versions=machine.versions(_PACKAGES),
        subject={
            "tensors": len(checkpoint.tensors),
            "shards": len(checkpoint.shards),
            "bytes": checkpoint.nbytes,
            "reader threads": threads,
        },
        outcomes=outcomes,
        notes=_NOTES,
    )
    columns = _columns(report, checkpoint.nbytes)
    console.print(table(report, columns))
    if json_path is not None:
        json_path.write_text(report.to_json())
    plotted = plot_path is not None and _plot(report, plot_path, checkpoint.nbytes, console)
    if markdown_path is not None:
        image = (
            Path(os.path.relpath(plot_path.with_suffix(".svg"), markdown_path.parent))
            if plotted and plot_path
            else None
        )
        markdown_path.write_text(markdown(report, columns, str(image) if image else None))
    return report


def warm(checkpoint: Checkpoint) -> None:
    """Read every shard once, so that it lies in the page cache."""
    scratch = bytearray(8 * MiB)
    for shard in checkpoint.shards:
        with shard.path.open("rb", buffering=0) as file:
            while file.readinto(scratch):
                pass


def _contender(name: str, path: Path, threads: int) -> Contender:
    return Contender(
        name,
        check=Spec(name, str(path), "check", threads).command(),
        time=Spec(name, str(path), "time", threads).command(),
    )


def _rates(measure: str, nbytes: int) -> Callable[[Outcome], list[float]]:
    return lambda outcome: [nbytes / GiB / measures[measure] for measures in outcome.rounds]


def _columns(report: Report, nbytes: int) -> list[Column]:
    reference = next((outcome for outcome in report.outcomes if outcome.name == _REFERENCE and outcome.rounds), None)

    def rate(heading: str, measure: str) -> Column:
        return Column(heading, lambda outcome: str(Spread.of(_rates(measure, nbytes)(outcome))))

    def ratio(measure: str) -> Column:
        def cell(outcome: Outcome) -> str:
            if reference is None:
                return "–"
            rates = _rates(measure, nbytes)
            return f"{Spread.of(rates(outcome)).median / Spread.of(rates(reference)).median:.2f} ×"

        return Column("", cell)

    def peak(outcome: Outcome) -> str:
        return format_bytes(round(Spread.of([measures["peak_bytes"] for measures in outcome.rounds]).median))

    return [
        rate("first, GiB/s", "first_s"),
        ratio("first_s"),
        rate("steady, GiB/s", "steady_s"),
        ratio("steady_s"),
        Column("peak", peak),
        Column("in file", lambda outcome: format_bytes(outcome.facts["file_backed_bytes"])),
    ]


def _plot(report: Report, path: Path, nbytes: int, console: Console) -> bool:
    series = [
        ("first call (fresh memory)", _rates("first_s", nbytes)),
        ("steady", _rates("steady_s", nbytes)),
    ]
    try:
        plot(report, path, series, "GiB/s")
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install 'mball[bench]')")
        return False
    return True
