"""`mball bench layers` on the CPU, in a small form."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mball.bench.baselines import DISK_DIRECT
from mball.bench.cli import app
from mball.bench.layers import Settings, run_layers
from mball.bench.layers_contenders import ACCELERATE, MBALL
from mball.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 100}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("source", ["image", "disk"])
def test_a_small_model(model: Path, tmp_path: Path, source: str) -> None:
    data, console = tmp_path / "layers.json", Console(file=io.StringIO(), width=160)
    settings = Settings(source=source, steps=20, rounds=1, share=0.5, limit_s=20)
    report = run_layers(model, settings, json_path=data, markdown_path=tmp_path / "layers.md", console=console)
    ours, peer, *hardware = report.outcomes
    assert [outcome.name for outcome in hardware] == ([DISK_DIRECT] if source == "disk" else [])
    assert all(outcome.rounds for outcome in hardware), hardware
    assert (ours.name, ours.not_run) == (MBALL, None)
    assert ours.facts["streamed"] == "4 of 8 layers"
    assert ours.facts["compared_tokens"] == 32
    (measures,) = ours.rounds
    assert measures["bound_s"] >= max(measures["resident_step_s"], measures["streamed_bytes"] / measures["raw_bytes_s"])
    assert 0 < measures["weights_bytes"] < sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert peer.not_run is not None
    assert "GPUs alone" in peer.not_run
    kept = json.loads(data.read_text())["reports"][0]
    assert kept["command"].startswith(f"mball bench layers {model.name} --device cpu --share 0.5 --source {source}")
    assert "wanted: 1.12" in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"| {MBALL} |" in (tmp_path / "layers.md").read_text()
    assert ACCELERATE in (tmp_path / "layers.md").read_text()


def test_wrong_arguments(model: Path) -> None:
    for arguments in (["--source", "tape"], ["--peers", "nobody"], ["--share", "2"]):
        result = CliRunner().invoke(app, ["layers", str(model), *arguments])
        assert isinstance(result.exception, ConfigError), arguments
