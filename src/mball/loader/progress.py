"""A progress bar for a load: bytes, GiB/s, time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from mball.loader import workers
from mball.units import format_bytes, format_rate


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        return Text(format_rate(int(task.completed), elapsed or 0.0), style="progress.data.speed")


class _Bytes(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{format_bytes(int(task.completed))} of {format_bytes(int(task.total or 0))}")


@contextmanager
def progress_bar(description: str, console: Console | None = None) -> Iterator[workers.Progress]:
    """A bar on the console while the block runs; yields the callback that the loader wants."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Bytes(), _Rate(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=None)

        def update(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield update
