import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mball.bench import machine
from mball.bench.report import SCHEMA_VERSION, Column, Report, Spread, from_json, markdown, plot, table, to_json
from mball.bench.runner import Outcome
from mball.errors import ConfigError

COLUMNS = [Column("seconds", lambda outcome: str(Spread.of(seconds(outcome))))]


def seconds(outcome: Outcome) -> list[float]:
    return [measures["s"] for measures in outcome.rounds]


@pytest.fixture
def report() -> Report:
    return Report(
        benchmark="test",
        setting={"device": "cpu"},
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


def test_json_has_everything_and_is_read_again(report: Report) -> None:
    text = to_json([report, report])
    parsed = json.loads(text)
    assert parsed["schema_version"] == SCHEMA_VERSION
    assert parsed["reports"][1]["outcomes"][0]["rounds"] == [{"s": 1.0}, {"s": 2.0}, {"s": 4.0}]
    assert from_json(text) == [report, report]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2, "reports": [{}]}', '{"schema_version": 1}'])
def test_what_is_no_result(text: str) -> None:
    with pytest.raises(ConfigError):
        from_json(text)


def test_outcomes_by_name(report: Report) -> None:
    assert report.outcome("fast") is report.outcomes[0]
    assert report.outcome("absent") is None
    assert report.outcome("nobody") is None


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
    assert markdown(report, COLUMNS, None, level=2).startswith("## A title")


def test_the_plot_is_written_twice(report: Report, tmp_path: Path) -> None:
    plot(report, tmp_path / "p", [("first", seconds), ("second", seconds)], "s")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    plot(report, tmp_path / "q", [("first", seconds), ("none", lambda outcome: [])], "s")
    svg = (tmp_path / "p.svg").read_text()
    assert "<svg" in svg


def test_the_machine_in_words() -> None:
    described = machine.describe()
    assert all(described.values())
    assert "core" in described["cpu"]
    assert "gpu" in machine.describe("cuda:0")
    assert machine.versions(["torch", "no-such-package"]).keys() == {"mball", "torch"}
