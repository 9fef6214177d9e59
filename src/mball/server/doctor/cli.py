"""The command, and how a report looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mball.server.doctor.report import Report


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where the models are: the disk that is measured.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has for MBALL, and what each missing thing costs."""
    from mball.server.doctor.examine import examine

    report = examine(folder)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(render(report))


def render(report: Report) -> RenderableType:
    found = Table.grid(padding=(0, 2))
    advice = Table.grid(padding=(0, 2))
    for finding in report.findings:
        mark = Text("✓", "green") if finding.fine else Text("✗", "yellow")
        found.add_row(mark, Text(finding.name, "bold"), Text(finding.value))
        if not finding.fine:
            advice.add_row(Text(finding.name, "bold"), Text(finding.cost))
            advice.add_row("", Text(f"→ {finding.mend}\n", "dim"))
    if not advice.rows:
        return found
    return Group(found, Text("\nWhat that costs, and what to do:", "bold"), advice)
