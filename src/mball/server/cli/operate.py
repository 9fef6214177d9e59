"""ps, events, load, unload, pin, unpin, balloon: looking at a running server and moving its models."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mball.server.client import DEFAULT_URL, Client
from mball.units import format_bytes, parse_bytes

Url = Annotated[str, typer.Option("--url", envvar="MBALL_URL", help="The server's address.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Argument(help="The model's name.")]


def table(state: dict[str, Any]) -> Table:
    """The models of a state, one a row, on their rungs."""
    dram, several = state["dram"], len(state["devices"]) > 1
    lines = [_device(device, number if several else None) for number, device in enumerate(state["devices"])]
    lines.append(f"dram: {_dram(dram)} of {format_bytes(dram['total_bytes'])}")
    if state["swap"] is not None:
        lines.append(_swap(state["swap"]))
    title = ("\n" if several or state["swap"] is not None else "   ").join(lines)
    view = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=0)
    on = ["on"] if several else []
    for name in ("model", "rung", *on, "device", "running", "queued", "swaps", "last", "GiB/s"):
        view.add_column(name, justify="left" if name in ("model", "rung") else "right", no_wrap=True)
    numbers = {device["name"]: str(number) for number, device in enumerate(state["devices"])}
    styles = {"device": "green", "dram": "yellow", "nvme": "blue", "failed": "red"}
    for model in state["models"]:
        shown = model["shown_as"]
        swap, rate = model["last_swap_s"], model["load_gib_s"]
        view.add_row(
            model["name"] + (" (pinned)" if model["pinned"] else "") + (" (leaving)" if model.get("retired") else ""),
            f"[{styles.get(shown, 'dim')}]{shown}[/]",
            *([numbers.get(model["device"], "")] if several else []),
            format_bytes(model["device_bytes"]) + ("*" if model["ballooned_bytes"] else ""),
            str(model["in_flight"]),
            str(model["queued"]),
            str(model["promotions"]),
            f"{swap:.2f} s" if swap is not None else "",
            f"{rate:.1f}" if rate is not None else "",
        )
    return view


def _device(device: dict[str, Any], number: int | None) -> str:
    """What it is, who has how much of it, and whether it answers."""
    name = device["name"] if number is None else f"{number}  {device['name']}"
    text = (
        f"{name}: {format_bytes(device['measured_bytes'])} measured, "
        f"{format_bytes(device['promised_bytes'])} promised of {format_bytes(device['limit_bytes'])}"
    )
    if device["foreign_bytes"]:
        text += f", {format_bytes(device['foreign_bytes'])} held by others"
    return f"{text}, does not answer" if device["lost"] else text


def _swap(swap: dict[str, Any]) -> str:
    """How full the swap store is, and what is wrong with it."""
    if swap["state"] != "open":
        return f"swap: {swap['path']}, {swap['error'] or swap['state']}"
    held = format_bytes(swap["image_bytes"] + swap["block_bytes"])
    text = f"swap: {held} of {format_bytes(swap['total_bytes'])}, {swap['images']} images, {swap['blocks']} KV blocks"
    if swap["daily_write_bytes"] is not None:
        limit = format_bytes(swap["daily_write_bytes"])
        text += f", {format_bytes(swap['written_today_bytes'])} written today of {limit}"
    return f"{text}, read-only: {swap['read_only']}" if swap["read_only"] else text


def _dram(dram: dict[str, Any]) -> str:
    images, workers = format_bytes(dram["image_bytes"]), dram["worker_bytes"]
    return images if not workers else f"{images} of images and {format_bytes(workers)} of workers"


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
        console.print(f"[dim]{_details(model)}[/]", soft_wrap=True, highlight=False)
    if state["dram"]["pressure"]["pressed"]:
        limit = format_bytes(state["dram"]["limit_bytes"])
        console.print(f"[yellow]host memory is short: images may have {limit}[/]", soft_wrap=True)
    for model in state["models"]:
        if model["error"]:
            console.print(f"[red]{model['name']}[/]: {model['error']}", soft_wrap=True)


def _details(model: dict[str, Any]) -> str:
    """What it needs and how that is known, what its balloon has, and its worker of host memory, where it computes, and
    what was last done with it."""
    parts = []
    if model["known_from"] != "nothing":
        parts.append(f"needs {format_bytes(model['needed_bytes'])} ({model['known_from']})")
    if model["ballooned_bytes"]:
        parts.append(f"*{format_bytes(model['ballooned_bytes'])} ballooned")
    if model["host_bytes"]:
        parts.append(f"{format_bytes(model['host_bytes'])} of host memory")
    if cores := model["cores"]:
        cpus, threads = ",".join(map(str, cores["cpus"])), cores["threads"]
        parts.append(f"{threads} thread{'s' if threads > 1 else ''} on cores {cpus}")
    if last := model["last_event"]:
        parts.append(_event(last))
    return f"{model['name']}: {'; '.join(parts)}" if parts else model["name"]


def _event(event: dict[str, Any]) -> str:
    """In words."""
    kind, reason = event["kind"], event.get("reason")
    return f"{kind}: {reason}" if reason else str(kind)


def events(
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    recent: Annotated[int, typer.Option("--recent", "-n", min=0, max=1024, help="Begin with so many past ones.")] = 10,
    follow: Annotated[bool, typer.Option(help="Go on as things happen, until Ctrl-C.")] = True,
) -> None:
    """Follow what the server decides and does, and why."""
    console = Console()
    with Client(url) as client:
        found = client.events(recent) if follow else iter(client.state()["events"][-recent:] if recent else [])
        try:
            for event in found:
                if as_json:
                    typer.echo(json.dumps(event))
                    continue
                at = time.strftime("%H:%M:%S", time.localtime(event["at"])) if "at" in event else "--:--:--"
                text = f"{event['missed']} events are no longer kept" if event["kind"] == "missed" else _event(event)
                name = f"{event['model']} " if event.get("model") else ""
                console.print(f"{at} {name}{text}", soft_wrap=True, highlight=False, markup=False)
        except KeyboardInterrupt:
            return


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


def balloon(
    model: Model,
    size: Annotated[str, typer.Argument(metavar="BYTES", help="As 512MiB; 0 gives all of it back.")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Have a model do without so much of its device memory, while it serves."""
    try:
        nbytes = parse_bytes(size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="BYTES") from None
    with Client(url) as client:
        state = client.balloon(model, nbytes)
    if as_json:
        typer.echo(json.dumps(state, indent=2))
    else:
        has = format_bytes(state["ballooned_bytes"] if state["shown_as"] == "device" else state["balloon_bytes"])
        typer.echo(f"{model}: {state['shown_as']}, {has} ballooned")


def add_to(app: typer.Typer) -> None:
    for command in (ps, events, load, unload, pin, unpin, balloon):
        app.command()(command)
