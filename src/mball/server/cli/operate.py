"""ps, load, unload, pin, unpin: looking at a running server and moving its models."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mball.server.client import DEFAULT_URL, Client
from mball.units import format_bytes

Url = Annotated[str, typer.Option("--url", envvar="MBALL_URL", help="The server's address.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Argument(help="The model's name.")]


def table(state: dict[str, Any]) -> Table:
    """The models of a state, one a row, on their rungs."""
    device, dram = state["device"], state["dram"]
    title = (
        f"{device['name']}: {format_bytes(device['measured_bytes'])} measured, "
        f"{format_bytes(device['promised_bytes'])} promised of {format_bytes(device['total_bytes'])}"
        f"   dram: {format_bytes(dram['image_bytes'])} of {format_bytes(dram['total_bytes'])}"
    )
    view = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for name in ("model", "rung", "device", "running", "queued", "swaps", "last", "GiB/s"):
        view.add_column(name, justify="left" if name in ("model", "rung") else "right", no_wrap=True)
    styles = {"device": "green", "dram": "yellow", "failed": "red"}
    for model in state["models"]:
        shown = model["shown_as"]
        swap, rate = model["last_swap_s"], model["load_gib_s"]
        view.add_row(
            model["name"] + (" (pinned)" if model["pinned"] else ""),
            f"[{styles.get(shown, 'dim')}]{shown}[/]",
            format_bytes(model["device_bytes"]),
            str(model["in_flight"]),
            str(model["queued"]),
            str(model["promotions"]),
            f"{swap:.2f} s" if swap is not None else "",
            f"{rate:.1f}" if rate is not None else "",
        )
    return view


def ps(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show each model's rung, bytes, requests and last swap."""
    with Client(url) as client:
        state = client.state()
    if as_json:
        typer.echo(json.dumps(state, indent=2))
        return
    console = Console()
    console.print(table(state))
    for model in state["models"]:
        if model["error"]:
            console.print(f"[red]{model['name']}[/]: {model['error']}", soft_wrap=True)


def _move(verb: str, model: str, url: str, as_json: bool) -> None:
    with Client(url) as client:
        state = client.move(model, verb)
    if as_json:
        typer.echo(json.dumps(state, indent=2))
    else:
        typer.echo(f"{model}: {state['shown_as']}{', pinned' if state['pinned'] else ''}")


def load(model: Model, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Bring a model to the device."""
    _move("load", model, url, as_json)


def unload(model: Model, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Give a model's device memory back, after its requests."""
    _move("unload", model, url, as_json)


def pin(model: Model, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Keep a model on the device."""
    _move("pin", model, url, as_json)


def unpin(model: Model, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Let a model be demoted again."""
    _move("unpin", model, url, as_json)


def add_to(app: typer.Typer) -> None:
    for command in (ps, load, unload, pin, unpin):
        app.command()(command)
