"""`mball bench kv` on the CPU, in a small form."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mball.bench.cli import app
from mball.bench.kv import Settings, ratio, run_kv, verdicts
from mball.bench.kv_contenders import SlowSlots
from mball.bench.report import Report
from mball.bench.runner import Outcome
from mball.errors import ConfigError
from mball.swap.disk import aligned
from mball.swap.kv_local import LocalBlocks
from mball.units import MiB
from tests.swap.stores import MODEL, block, content, open_at


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 100}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    return folder


def test_a_small_model(model: Path, tmp_path: Path) -> None:
    data, console, disk = tmp_path / "kv.json", Console(file=io.StringIO(), width=160), tmp_path / "disk"
    disk.mkdir()
    settings = Settings(tokens=128, stores=(disk,), disk_rate=float(MiB), repeats=2, rounds=1)
    report = run_kv(model, settings, json_path=data, markdown_path=tmp_path / "kv.md", console=console)
    assert [outcome.name for outcome in report.outcomes] == ["DRAM", f"store in {disk}", "store held to 0.00098 GiB/s"]
    for outcome in report.outcomes:
        assert outcome.not_run is None, outcome.not_run
        (measures,) = outcome.rounds
        assert min(measures[f"{mode}_s"] for mode in ("computed", "restored", "gate")) > 0
        assert measures["decisions"] == 2 * 3, "128, 64 and 32 tokens"
        assert set(outcome.facts["by tokens"]) == {"128", "64", "32"}
    held = report.outcomes[2].rounds[0]
    assert held["kv_bytes"] == 7 * 16 * 2 * 4 * 2 * 16 * 4
    assert held["restored_s"] > held["kv_bytes"] / MiB
    kept = json.loads(data.read_text())["reports"][0]
    assert kept["command"].startswith(f"mball bench kv {model.name} --device cpu --tokens 128 --store {disk}")
    assert "| DRAM |" in (tmp_path / "kv.md").read_text()
    assert list(disk.iterdir()) == []


def outcome(name: str, computed: float, restored: float, admitted: float, wrong: float = 0) -> Outcome:
    times = {"computed_s": computed, "restored_s": restored, "gate_s": min(computed, restored)}
    return Outcome(name, rounds=[{**times, "admitted": admitted, "wrong": wrong, "decisions": 10}])


def test_it_is_judged_by_the_forced_runs() -> None:
    outcomes = [
        outcome("DRAM", 0.4, 0.05, 1.0),
        outcome("store in x", 0.4, 0.8, 0.0),
        outcome("store held to 1", 0.4, 0.8, 1.0, wrong=2),
    ]
    report = Report("kv", {}, "", "", "", {}, {}, {}, outcomes, [])
    assert [ratio(o) for o in outcomes] == [8.0, 0.5, 0.5]
    says = verdicts(report)
    assert [line.rpartition("is ")[2] for line in says[:3]] == ["right.", "right.", "wrong."]
    assert "admits" in says[0]
    assert "refuses" in says[1]
    assert says[3].startswith("2 of 30 decisions were wrong: 6.7% (wanted 5%: not reached)")


def test_a_slow_disk_reads_what_is_there(tmp_path: Path) -> None:
    store = open_at(tmp_path / "store")
    want = block("a")
    store.put(want, content("a", want.nbytes))
    slots = SlowSlots(store.slots, 1e6)
    (place,) = LocalBlocks(store, "x").find([want.key], MODEL)
    memory = aligned(want.nbytes)
    slots.read(place, memory)
    assert memory == content("a", want.nbytes)
    store.close()


def test_wrong_arguments(model: Path, tmp_path: Path) -> None:
    for arguments in (["--store", str(tmp_path / "none")], ["--disk-rate", "1GiB"]):
        result = CliRunner().invoke(app, ["kv", str(model), *arguments])
        assert isinstance(result.exception, ConfigError), arguments
