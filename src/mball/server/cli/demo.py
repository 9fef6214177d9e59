"""The demo: several real models take turns on a device that holds one of them at a time."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mball.errors import MballError
from mball.server.cli.operate import table
from mball.server.client import Client
from mball.server.run import running_server
from mball.units import format_bytes

QUESTIONS = (
    "Name the three primary colours.",
    "Why is the sky blue? One sentence.",
    "What is the capital of France, and what is it known for?",
)
_REFRESH_S = 0.25
_MAX_TOKENS = 48


class DemoFailed(MballError):
    """The demo did not show what it should."""


@dataclass
class _Seen:
    """What the demo saw, from outside the server."""

    first_token_s: dict[str, list[float]] = field(default_factory=dict)
    answers: int = 0
    peak_bytes: int = 0
    budget_bytes: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def view(self) -> RenderableType:
        if not self.state:
            return Text("starting…")
        return Group(table(self.state), Panel(Text(self.text or "…"), title="answer", title_align="left", height=6))


def run_demo(config: Path, *, rounds: int, log: Path, console: Console) -> None:
    """Serves the config's models, asks each chat model in turn, streamed, and embeds. Raises DemoFailed."""
    seen = _Seen()
    log.unlink(missing_ok=True)
    with running_server(["--config", str(config)], log=log) as server:
        workers = _ask_all(server.url, rounds, seen, console)
    left = [pid for pid in workers if psutil.pid_exists(pid)]
    _summary(seen, console)
    if left:
        raise DemoFailed(f"processes are left running: {left}")
    if seen.peak_bytes > seen.budget_bytes:
        peak, budget = format_bytes(seen.peak_bytes), format_bytes(seen.budget_bytes)
        raise DemoFailed(f"the models held {peak} of a budget of {budget}; see {log}")
    console.print(f"Nothing is left running. The server's log: {log}")


def _ask_all(url: str, rounds: int, seen: _Seen, console: Console) -> list[int]:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        _watching(url, seen, console),
    ):
        names = [model.id for model in client.models.list().data]
        chat_models = [name for name in names if not name.startswith("all-minilm")]
        for turn in range(rounds):
            for name in chat_models:
                _ask(client, name, QUESTIONS[turn % len(QUESTIONS)], seen)
        for name in set(names) - set(chat_models):
            vectors = client.embeddings.create(model=name, input=list(QUESTIONS)).data
            seen.text = f"{name}: {len(vectors)} vectors of {len(vectors[0].embedding)} numbers"
            seen.answers += 1
    with Client(url) as state:
        seen.state = state.state()
    return [model["pid"] for model in seen.state["models"] if model["pid"]]


def _ask(client: openai.OpenAI, name: str, question: str, seen: _Seen) -> None:
    seen.text = f"{name} ← {question}\n"
    started = time.monotonic()
    first: float | None = None
    with client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": question}],
        stream=True,
        temperature=0,
        max_tokens=_MAX_TOKENS,
    ) as stream:
        for chunk in stream:
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                first = first if first is not None else time.monotonic() - started
                seen.text += piece
    if first is None:
        raise DemoFailed(f"{name} gave no answer to {question!r}")
    seen.answers += 1
    seen.first_token_s.setdefault(name, []).append(first)


@contextlib.contextmanager
def _watching(url: str, seen: _Seen, console: Console) -> Iterator[None]:
    """A live table of the server's state while the body runs."""
    done = threading.Event()

    def watch() -> None:
        with Client(url) as client, Live(seen.view(), console=console, transient=not console.is_terminal) as live:
            while not done.wait(_REFRESH_S):
                seen.state = client.state()
                devices = seen.state["devices"]
                seen.peak_bytes = max(seen.peak_bytes, sum(device["measured_bytes"] for device in devices))
                seen.budget_bytes = sum(device["total_bytes"] for device in devices)
                live.update(seen.view())

    watcher = threading.Thread(target=watch, name="demo-table")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(timeout=30)


def _summary(seen: _Seen, console: Console) -> None:
    view = Table(title="What you saw", title_justify="left", header_style="bold")
    for name in ("model", "swaps", "last swap", "load", "first token", "slowest"):
        view.add_column(name, justify="left" if name == "model" else "right", no_wrap=name == "model")
    for model in seen.state["models"]:
        waits = seen.first_token_s.get(model["name"], [])
        swap, rate = model["last_swap_s"], model["load_gib_s"]
        view.add_row(
            model["name"],
            str(model["promotions"]),
            f"{swap:.2f} s" if swap is not None else "",
            f"{rate:.1f} GiB/s" if rate is not None else "",
            f"{statistics.median(waits):.2f} s" if waits else "",
            f"{max(waits):.2f} s" if waits else "",
        )
    console.print(view)
    console.print(
        f"{seen.answers} answers from {len(seen.state['models'])} models; at most {format_bytes(seen.peak_bytes)} "
        f"of {format_bytes(seen.budget_bytes)} device memory held at once."
    )
