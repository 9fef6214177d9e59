import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mball.bench import machine
from mball.bench.report import SCHEMA_VERSION, Column, Report, Spread, markdown, plot, table
from mball.bench.runner import Outcome

COLUMNS = [Column("seconds", lambda outcome: str(Spread.of(seconds(outcome))))]


def seconds(outcome: Outcome) -> list[float]:
    return [measures["s"] for measures in outcome.rounds]


@pytest.fixture
def report() -> Report:
    return Report(
        benchmark="test",
        title="A title",
        command="mball bench test X",
        started="2025-01-01 00:00 UTC",
        machine={"cpu": "some cpu"},
        versions={"torch": "2"},
        subject={"bytes": 12},
        outcomes=[
            Outcome("fast", {"k": 1}, [{"s": 1.0}, {"s": 2.0}, {"s": 4.0}]),
            Outcome("absent", not_run="it is not installed"),
        ],
        notes=["A note."],
    )


def test_spread() -> None:
    assert str(Spread.of([1.0, 2.0, 4.0])) == "2.00 ± 1.50"
    assert Spread.of([3.0]) == Spread(3.0, 0.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_json_has_everything(report: Report) -> None:
    parsed = json.loads(report.to_json())
    assert parsed["schema_version"] == SCHEMA_VERSION
    assert parsed["command"] == "mball bench test X"
    assert parsed["outcomes"][0]["rounds"] == [{"s": 1.0}, {"s": 2.0}, {"s": 4.0}]
    assert parsed["outcomes"][1]["not_run"] == "it is not installed"
    assert (parsed["machine"], parsed["versions"]) == ({"cpu": "some cpu"}, {"torch": "2"})
    assert parsed["subject"] == {"bytes": 12}


def test_table_and_page_say_noise_and_what_was_not_run(report: Report) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(report, COLUMNS))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    page = markdown(report, COLUMNS, "load.svg")
    for text in (printed, page):
        assert "2.00 ± 1.50" in text
        assert "it is not installed" in text
        assert "A note." in text
    for text in ("mball bench test X", "| cpu | some cpu |", "| torch | 2 |", "![A title](load.svg)"):
        assert text in page
    assert "![" not in markdown(report, COLUMNS, None)


def test_the_plot_is_written_twice(report: Report, tmp_path: Path) -> None:
    plot(report, tmp_path / "p", [("first", seconds), ("second", seconds)], "s")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "p.svg").read_text()
    assert "<svg" in svg


def test_the_machine_in_words() -> None:
    described = machine.describe()
    assert all(described.values())
    assert "core" in described["cpu"]
    assert machine.versions(["torch", "no-such-package"]).keys() == {"torch"}
