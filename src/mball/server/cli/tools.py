"""models, bench, batch, doctor, demo: everything that is not serving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mball.bench.cli import app as bench_app
from mball.server.batch.cli import batch
from mball.server.doctor.cli import doctor
from mball.server.models.cli import app as models_app


def demo(
    config: Annotated[Path, typer.Argument(help="The demo's config.")] = Path("deploy/examples/demo.yaml"),
    rounds: Annotated[int, typer.Option(min=1, help="Questions to each model.")] = 3,
    log: Annotated[Path, typer.Option(help="Where the server's log goes.")] = Path(".demo/server.log"),
) -> None:
    """Several real models take turns on a device that holds one chat model at a time."""
    from mball.server.cli.demo import run_demo

    run_demo(config, rounds=rounds, log=log, console=Console())


def add_to(app: typer.Typer) -> None:
    app.add_typer(models_app, name="models")
    app.add_typer(bench_app, name="bench")
    for command in (demo, batch, doctor):
        app.command()(command)
