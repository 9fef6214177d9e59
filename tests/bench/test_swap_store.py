from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mball.bench.report import Report, from_json
from mball.bench.runner import Outcome
from mball.bench.swap_contenders import BLOCKS, IMAGE, names, raw
from mball.bench.swap_store import Settings, best_raw, run_store, verdicts
from mball.errors import ConfigError
from mball.units import GiB, KiB, MiB


def test_a_small_run(tmp_path: Path) -> None:
    out, work = tmp_path / "out.json", tmp_path / "work"
    work.mkdir()
    settings = Settings(work, size_bytes=2 * MiB, slot_bytes=64 * KiB, depths=(1, 2), threads=2, rounds=2)
    run_store(settings, json_path=out, markdown_path=tmp_path / "page.md", console=Console(quiet=True))
    (report,) = from_json(out.read_text())
    assert [outcome.name for outcome in report.outcomes] == names((1, 2))
    for outcome in report.outcomes:
        assert outcome.not_run is None
        assert len(outcome.rounds) == 2
        assert all(measures["bytes"] == 2 * MiB and measures["read_s"] > 0 for measures in outcome.rounds)
    assert "mball, one image, read" in report.notes[0]
    assert "raw O_DIRECT, depth 2" in (tmp_path / "page.md").read_text()
    assert list(work.iterdir()) == [], "the files are gone"


def outcome(name: str, read: float, write: float) -> Outcome:
    return Outcome(name, rounds=[{"bytes": GiB, "read_s": 1 / read, "write_s": 1 / write}])


def test_it_is_judged_by_the_best_depth_of_each_way(tmp_path: Path) -> None:
    outcomes = [
        outcome(IMAGE, 9.4, 4.0),
        outcome(BLOCKS, 5.0, 4.6),
        outcome(raw(1), 10.0, 3.0),
        outcome(raw(8), 8.0, 5.0),
    ]
    report = Report("swap store", {}, "", "", "", {}, {}, {}, outcomes, [])
    assert [best.name for way in ("read", "write") if (best := best_raw(report, way))] == [raw(1), raw(8)]
    reached = [line.rpartition(": ")[2] for line in verdicts(report)]
    assert reached == ["reached", "not reached", "not reached", "reached"]
    assert verdicts(replace(report, outcomes=outcomes[1:]))[0] == f"{IMAGE}, read: not measured"


@pytest.mark.parametrize("changed", [{"depths": ()}, {"depths": (0,)}, {"size_bytes": 3 * MiB + 1}])
def test_settings_that_make_no_sense(tmp_path: Path, changed: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        replace(Settings(tmp_path), **changed).check()  # type: ignore[arg-type]
