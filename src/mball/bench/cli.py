"""`mball bench`: measure this machine, MBALL and its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Measure this machine, MBALL and its peers.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    pass


@app.command()
def load(
    model: Annotated[Path, typer.Argument(help="A model's folder, or one safetensors file.")],
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes per contender.")] = 5,
    peers: Annotated[str, typer.Option(help="Whom to measure beside MBALL, by commas.")] = "safetensors,transformers",
    threads: Annotated[
        int | None, typer.Option(min=1, help="MBALL's reader threads. Default: cores, at most 8.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every round here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here: PLOT.svg and PLOT.png.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table, machine and versions here.")] = None,
) -> None:
    """How fast weights come from the page cache into memory, against safetensors and transformers."""
    from mball.bench.load import run_load

    run_load(
        model,
        rounds=rounds,
        peers=[peer for peer in peers.split(",") if peer],
        threads=threads,
        json_path=json,
        plot_path=plot,
        markdown_path=markdown,
        console=Console(),
    )
