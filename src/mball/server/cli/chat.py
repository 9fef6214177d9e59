"""chat: a conversation with a model of a running server."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console

from mball.server.cli.operate import Json, Url
from mball.server.client import DEFAULT_URL, Client


def chat(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask once and end.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Chat with a model; an empty line or Ctrl-D ends it."""
    console = Console()
    messages = [{"role": "system", "content": system}] if system else []
    with Client(url) as client:
        while True:
            text = message if message is not None else _ask(console)
            if not text:
                return
            messages.append({"role": "user", "content": text})
            started, first, pieces = time.monotonic(), 0.0, list[str]()
            for piece in client.chat(model, messages, max_tokens=max_tokens, temperature=temperature):
                first = first or time.monotonic() - started
                pieces.append(piece)
                if not as_json:
                    console.out(piece, end="", highlight=False)
            answer = "".join(pieces)
            messages.append({"role": "assistant", "content": answer})
            if as_json:
                typer.echo(json.dumps({"model": model, "content": answer, "first_token_s": round(first, 3)}))
            else:
                console.print(f"\n[dim]first token after {first:.2f} s[/]")
            if message is not None:
                return


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def add_to(app: typer.Typer) -> None:
    app.command()(chat)
