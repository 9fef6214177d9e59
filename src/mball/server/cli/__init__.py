"""`mball`: the command line. Heavy imports happen inside the commands, so that `mball ps` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from mball import __version__
from mball.errors import MballError
from mball.server.cli import chat, keys, operate, serve, swap, tools

app = typer.Typer(
    name="mball",
    help="Memory Ballooner: serve more language models than your GPUs can hold.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mball {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


serve.add_to(app)
operate.add_to(app)
chat.add_to(app)
swap.add_to(app)
keys.add_to(app)
tools.add_to(app)


def main() -> None:
    """Runs the command; an error of ours is one line on stderr and exit code 1."""
    try:
        app()
    except MballError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]mball:[/] {error}", highlight=False, markup=True)
        sys.exit(1)
