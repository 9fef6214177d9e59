"""Figures: smoothed, kept, and forgotten where they no longer hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from mball.memory.figures import Figures, HighWater, Needs
from mball.memory.figures_store import FiguresStore, Kept
from mball.memory.states import Weights


def some() -> Figures:
    figures = Figures(needs=Needs(1, 20, 30, 4), load_rate=5e9)
    figures.start_s.add(3.0)
    figures.demote_s.add(0.5)
    figures.promote_s[Weights.DRAM].add(1.5)
    figures.held.add(60, 0.0, used=True)
    return figures


def test_the_high_water_rises_at_once_and_comes_down_while_less_is_used() -> None:
    held = HighWater()
    held.add(100, 0.0, used=True)
    held.add(300, 1.0, used=True)
    assert held.value == 300
    held.add(100, 61.0, used=True)
    assert held.value == 300, "the peak was in this minute"
    for minute in range(2, 12):
        held.add(100, 61.0 * minute, used=True)
        held.add(100, 61.0 * minute + 60.5, used=True)
    assert 100 <= held.value < 110


def test_a_model_that_does_nothing_shows_nothing_of_what_it_needs() -> None:
    held = HighWater()
    held.add(300, 0.0, used=True)
    for second in range(1000):
        held.add(100, 70.0 + second, used=False)
    assert held.value == 300


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 50), st.booleans()), min_size=1))
def test_the_high_water_is_never_under_what_is_held(steps: list[tuple[int, float, bool]]) -> None:
    held, now_s, most = HighWater(), 0.0, 0
    for nbytes, pause_s, used in steps:
        now_s, most = now_s + pause_s, max(most, nbytes)
        held.add(nbytes, now_s, used=used)
        assert nbytes <= held.value <= most


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    store = FiguresStore(tmp_path / "state")
    assert store.load() == {}
    kept = Kept.of(some(), "r1", 0.25, 1000.0)
    assert store.save({"a": kept})
    assert FiguresStore(tmp_path / "state").load() == {"a": kept}
    back = store.load()["a"].figures()
    assert (back.start_s.value, back.demote_s.value, back.balloon_s.value) == (3.0, 0.5, None)
    assert back.promote_s[Weights.DRAM].value == 1.5
    assert back.promote_s[Weights.SOURCE].value is None
    assert (back.held.value, back.needs) == (60, Needs(1, 20, 30, 4))
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["figures.json"]


def test_another_servers_models_stay(tmp_path: Path) -> None:
    store = FiguresStore(tmp_path)
    store.save({"a": Kept.of(some(), "r1", 0.0, 1.0), "b": Kept.of(some(), "r1", 0.0, 1.0)})
    store.save({"b": Kept.of(Figures(), "r2", 0.0, 2.0)})
    found = store.load()
    assert (found["a"].revision, found["b"].revision) == ("r1", "r2")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2, "models": {}}',
        b'{"version": 1, "models": {"a": {"revision": "r", "saved_at": 1.0, "start_s": -1.0}}}',
        b'{"version": 1, "models": {"a": {"revision": "r", "saved_at": 1.0, "held_bytes": "many"}}}',
        b'{"version": 1, "models": {"a": {"revision": "r", "saved_at": NaN}}}',
    ],
)
def test_damage_is_a_new_beginning_with_one_warning(tmp_path: Path, damage: bytes) -> None:
    store = FiguresStore(tmp_path)
    store.path.write_bytes(damage)
    with capture_logs() as logs:
        assert store.load() == {}
    assert [line["log_level"] for line in logs] == ["warning"]
    assert store.save({"a": Kept.of(some(), "r1", 0.0, 1.0)})
    assert json.loads(store.path.read_text())["version"] == 1


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with capture_logs() as logs:
        assert not FiguresStore(tmp_path / "file").save({})
    assert [line["log_level"] for line in logs] == ["warning"]
