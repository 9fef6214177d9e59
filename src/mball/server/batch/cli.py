"""The command."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mball.errors import ConfigError

if TYPE_CHECKING:
    from mball.server.batch.work import Tally


def batch(
    source: Annotated[Path, typer.Option("--input", "-i", help="Requests in OpenAI's batch format, one a line.")],
    target: Annotated[Path, typer.Option("--output", "-o", help="Answers; those there already are not asked again.")],
    errors: Annotated[Path | None, typer.Option(help="What was no request or failed. [OUTPUT.errors]")] = None,
    url: Annotated[str | None, typer.Option("--url", envvar="MBALL_URL", help="A running server.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Start a server of this config for it.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Answer a file of requests, model by model; run it again to go on after an interruption."""
    import asyncio

    from mball.server.batch.run import run_batch

    failures = errors or target.with_name(target.name + ".errors")
    with _server(url, config, log=target.with_name(target.name + ".log")) as address, _bar() as progress:
        tally = asyncio.run(
            run_batch(source, target, address, errors=failures, concurrency=concurrency, progress=progress)
        )
    _tell(tally, target, failures, as_json)
    if tally.failed or tally.bad:
        raise typer.Exit(1)


@contextlib.contextmanager
def _server(url: str | None, config: Path | None, log: Path) -> Iterator[str]:
    from mball.server.client import DEFAULT_URL
    from mball.server.run import running_server

    if config is None:
        yield url or DEFAULT_URL
        return
    if url is not None:
        raise ConfigError("--url names a running server, --config starts one: give one of them")
    with running_server(["--config", str(config)], log=log) as server:
        yield server.url


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Tally], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("answering", total=None, rate="")

        def show(tally: Tally) -> None:
            rate = f"{tally.tokens / tally.seconds:.0f} tokens/s" if tally.seconds else ""
            bar.update(task, completed=tally.done, total=tally.total, rate=rate)

        yield show


def _tell(tally: Tally, target: Path, errors: Path, as_json: bool) -> None:
    import dataclasses

    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(tally), indent=2))
        return
    parts = [f"{tally.done - tally.failed} answers in {target}"]
    if tally.skipped:
        parts.append(f"{tally.skipped} were there")
    if tally.failed or tally.bad:
        parts.append(f"{tally.failed} failed and {tally.bad} bad lines in {errors}")
    if tally.tokens and tally.seconds:
        parts.append(f"{tally.tokens / tally.seconds:.0f} tokens/s")
    typer.echo("; ".join(parts))
