"""`mball models`: models to try MBALL with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from mball.errors import ConfigError
from mball.units import format_bytes, format_rate, parse_bytes

app = typer.Typer(help="Make models to try MBALL with.", no_args_is_help=True)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


@app.command("prepare-demo")
def prepare_demo(
    folder: Annotated[Path, typer.Argument(help="Where the models go, one folder each.")] = Path(".demo/models"),
) -> None:
    """Make the demo's four small real models; what is whole already is kept."""
    from mball.server.models.demo import CHAT_MODELS, EMBEDDING_MODEL, prepare

    console = Console(stderr=True)
    with _bar(console) as bar:
        task = bar.add_task("checking", total=None)
        made = prepare(
            folder, lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)
        )
        bar.update(task, description="done", total=1, completed=1)
    for name in (*CHAT_MODELS, EMBEDDING_MODEL):
        console.print(f"{folder / name}: {'made' if name in made else 'was there'}", highlight=False, soft_wrap=True)


@app.command("random")
def random_model(
    architecture: Annotated[Literal["llama", "qwen3", "qwen3-moe", "mixtral"], typer.Argument(metavar="ARCH")],
    folder: Annotated[Path, typer.Argument(help="Where the model goes; must not hold anything.")],
    size: Annotated[str, typer.Option(help="Bytes of its tensors, as 1.5GiB; met within 2 %.")] = "1GiB",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option()] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="The largest shard.")] = "1GiB",
    tokenizer_from: Annotated[Path | None, typer.Option(help="Copy this model folder's tokenizer.")] = None,
) -> None:
    """Make a model of random weights in a real architecture's shape, for benchmarks."""
    from mball.server.models import random

    console = Console(stderr=True)
    started = time.monotonic()
    with _bar(console) as bar:
        task = bar.add_task(f"writing {folder.name}", total=None)
        written = random.make(
            architecture,
            folder,
            size_bytes=_size("--size", size),
            seed=seed,
            dtype=dtype,
            max_shard_bytes=_size("--max-shard-size", max_shard_size),
            tokenizer_from=tokenizer_from,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    rate = format_rate(written, time.monotonic() - started)
    console.print(f"{folder}: {format_bytes(written)} at {rate}", highlight=False, soft_wrap=True)


@app.command()
def manifest(
    model: Annotated[Path, typer.Argument(help="A model's folder, or one safetensors file.")],
    check: Annotated[bool, typer.Option("--check", help="Compare the files with the manifest that is there.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read.")] = 4,
) -> None:
    """Write the digests of a model's shards beside it, for loads that verify every byte; or check them."""
    from mball.loader import Checkpoint
    from mball.loader.manifest import EXTENT_BYTES, Manifest, manifest_path

    console = Console(stderr=True)
    checkpoint = Checkpoint.open(model)
    written = Manifest.open(checkpoint) if check else None
    started = time.monotonic()
    with _bar(console) as bar:
        task = bar.add_task(f"reading {model.name}", total=None)
        found = Manifest.make(
            checkpoint,
            threads=threads,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            extent_bytes=written.extent_bytes if written is not None else EXTENT_BYTES,
        )
    nbytes = sum(shard.data_bytes for shard in checkpoint.shards)
    if written is not None:
        written.check(checkpoint, found)
        done = f"{model}: as {manifest_path(checkpoint).name} says"
    else:
        done = f"{found.write(checkpoint)}: {sum(len(shard.extents) for shard in found.shards.values())} extents"
    rate = format_rate(nbytes, time.monotonic() - started)
    console.print(f"{done}, {format_bytes(nbytes)} at {rate}", highlight=False, soft_wrap=True)


def _size(option: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
