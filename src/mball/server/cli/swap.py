"""`mball swap`: make, look at and check the store on a disk that weights and KV blocks are swapped to."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mball.errors import ConfigError, SwapUnavailable
from mball.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from mball.swap.check import Found

app = typer.Typer(help="The swap store on a disk: make it, look at it, check it.", no_args_is_help=True)

_MOST_SHOWN = 20


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="A file to make, or a block device that holds nothing.")],
    size: Annotated[str, typer.Option(help="Bytes that it may take in all, as 200GiB.")],
    slot: Annotated[str, typer.Option(help="Bytes of a slot, a multiple of 4 KiB.")] = "2MiB",
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty a store that is there.")] = False,
) -> None:
    """Make a store: all its space is taken now, so that a full disk never stops it later."""
    from mball.swap import opening

    if path.exists() and not fresh:
        _refuse_to_empty(path)
    opened = opening.acquire(path, size_bytes=_size(size), slot_bytes=_size(slot), fresh=fresh)
    layout = opened.superblock.layout
    opened.close()
    way = "direct I/O" if opened.disk.direct else "buffered I/O: its file system refuses O_DIRECT"
    Console().print(
        f"{path}: {layout.slots} slots of {format_bytes(layout.slot_bytes)}, "
        f"{format_bytes(layout.total_bytes)} on the disk, {way}",
        soft_wrap=True,
    )


@app.command()
def status(path: Annotated[Path, typer.Argument(help="A store.")]) -> None:
    """What a store holds, as its newest index says. Works while it is in use."""
    from mball.swap.check import look

    Console().print(_table(path, look(path)))


@app.command()
def check(path: Annotated[Path, typer.Argument(help="A store that nobody uses now.")]) -> None:
    """Read and verify every slot that holds something; nothing is written. Exit code 1 where anything is damaged."""
    from rich.progress import Progress

    from mball.swap.check import check as verify

    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("slots", total=None)
        found = verify(path, lambda done, total: bar.update(task, completed=done, total=total))
    table = _table(path, found)
    entries = len(found.snapshot.entries) if found.snapshot else 0
    table.add_row("verified", f"{found.slots_checked} slots; {found.entries_good} of {entries} entries are good")
    console.print(table)
    for bad in found.bad[:_MOST_SHOWN]:
        console.print(f"{bad.kind.name.lower()} {bad.key.hex()[:16]}: {bad.message}", style="red", soft_wrap=True)
    if len(found.bad) > _MOST_SHOWN:
        console.print(f"and {len(found.bad) - _MOST_SHOWN} more")
    if found.whole:
        console.print("Everything is as it was written.", style="green")
        return
    if found.bad or found.snapshot is None:
        console.print("What is damaged is never served: it is read from its source, or computed, again.")
    raise typer.Exit(1)


def _refuse_to_empty(path: Path) -> None:
    from mball.errors import SwapForeign
    from mball.swap.check import look

    try:
        found = look(path)
    except (SwapForeign, SwapUnavailable):
        # Nothing of worth, or not ours: making it says so better.
        return
    entries = len(found.snapshot.entries) if found.snapshot else 0
    raise SwapUnavailable(f"swap: {path} is a store already, with {entries} entries: `--fresh` makes it anew, empty")


def _table(path: Path, found: Found) -> Table:
    from mball.swap.index import Kind

    layout, snapshot = found.superblock.layout, found.snapshot
    images, blocks = found.entries(Kind.IMAGE), found.entries(Kind.BLOCK)
    used = sum(entry.place.slots for entry in (*images, *blocks))
    table = Table(box=SIMPLE, show_header=False, pad_edge=False, title=str(path), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    made = datetime.fromtimestamp(found.superblock.created_at).astimezone().isoformat(" ", "seconds")
    table.add_row("made", made)
    table.add_row("held by", found.held_by or "nobody")
    table.add_row("on the disk", format_bytes(layout.total_bytes))
    table.add_row("slots", f"{layout.slots} of {format_bytes(layout.slot_bytes)}, {layout.slots - used} free")
    table.add_row("images", f"{len(images)}, {format_bytes(sum(entry.place.nbytes for entry in images))}")
    table.add_row("KV blocks", f"{len(blocks)}, {format_bytes(sum(entry.place.nbytes for entry in blocks))}")
    if snapshot is not None:
        day = datetime.fromtimestamp(snapshot.day * 86400).date().isoformat()
        table.add_row("written", f"{format_bytes(snapshot.written_bytes)} on {day}")
    table.add_row("I/O", "direct" if found.direct else "buffered: its file system refuses O_DIRECT")
    table.add_row("superblocks", "; ".join(found.superblocks))
    table.add_row("indexes", "; ".join(found.indexes))
    return table


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="swap")
