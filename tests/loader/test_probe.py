from pathlib import Path

import pytest
import torch

from mball.loader import probe, transfer
from mball.loader.probe import Tuned, candidates, pick, tune_with
from mball.loader.ring import RingPool
from mball.loader.tuning import Choice, default_choice, profile, remember, remembered
from mball.units import GiB, MiB
from tests.device.fake_cuda import FakeRuntime


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mball/loader-probe.json"


def test_what_is_remembered_is_used_where_it_was_measured(cache: Path) -> None:
    assert remembered(32) is None
    remember(32, Choice(20, 4 * MiB))
    remember(8, Choice(6, 16 * MiB))
    found = profile(cpus=32, room_bytes=100 * GiB)
    assert (found.threads, found.buffer_bytes) == (20, 4 * MiB)
    assert profile(cpus=8, room_bytes=100 * GiB).buffer_bytes == 16 * MiB
    assert profile(cpus=16, room_bytes=100 * GiB).threads == default_choice(16).threads
    assert profile(3, cpus=32, room_bytes=100 * GiB).threads == 3
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"x": 1}'])
def test_a_damaged_file_is_as_none_and_written_anew(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert remembered(32) is None
    remember(32, Choice(20, 4 * MiB))
    assert remembered(32) == Choice(20, 4 * MiB)


@pytest.mark.parametrize("choice", [Choice(0, MiB), Choice(10**6, MiB), Choice(4, 0), Choice(4, 5), Choice(4, 2**40)])
def test_nonsense_is_not_used(choice: Choice) -> None:
    remember(32, choice)
    assert remembered(32) is None


def test_another_choice_must_be_clearly_faster() -> None:
    default, other = default_choice(16), Choice(16, 16 * MiB)
    assert pick({default: 100.0, other: 104.0}, default) == default
    assert pick({default: 100.0, other: 106.0}, default) == other
    assert default in candidates(16)
    assert len(candidates(16)) == len(set(candidates(16)))


def test_a_probe_copies_and_keeps_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    rings = RingPool()
    monkeypatch.setattr(transfer, "RINGS", rings)
    monkeypatch.setattr(probe, "usable_cpus", lambda cpus: 6)
    runtime = FakeRuntime()
    memory = torch.zeros(20 * MiB, dtype=torch.uint8)
    tuned = tune_with(runtime, memory)
    choice = tuned.choice
    assert choice == pick(tuned.rates, default_choice(6))
    assert list(tuned.rates) == candidates(6)
    assert all(rate > 0 for rate in tuned.rates.values())
    assert remembered(6) == choice
    assert memory.count_nonzero() > 0.9 * memory.numel()
    rings.release()
    assert runtime.registered == {}


def test_with_few_cores_there_is_nothing_to_probe(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "usable_cpus", lambda cpus: 2)
    assert tune_with(FakeRuntime(), torch.zeros(MiB, dtype=torch.uint8)) == Tuned(default_choice(2), {})
    assert not cache.exists()
