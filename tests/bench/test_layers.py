"""`mball bench layers` on the CPU, in a small form."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mball.bench.cli import app
from mball.bench.contenders import Cannot
from mball.bench.layers import Settings, run_layers
from mball.bench.layers_contenders import ACCELERATE, MBALL, VLLM
from mball.bench.layers_vllm import groups, step_time
from mball.bench.raw_disk import CHUNK_BYTES, Stretch, best, rates
from mball.errors import ConfigError
from tests.needs import missing


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
    settings = Settings(source=source, steps=20, rounds=1, share=0.5, limit_s=200, vllm=Path(sys.executable))
    report = run_layers(model, settings, json_path=data, markdown_path=tmp_path / "layers.md", console=console)
    ours, peer, other = report.outcomes
    assert (other.name, other.rounds) == (VLLM, [])
    assert "no vLLM in" in str(other.not_run)
    assert (ours.name, ours.not_run) == (MBALL, None)
    assert ours.facts["streamed"] == "4 of 8 layers"
    assert ours.facts["compared_tokens"] == 32
    (measures,) = ours.rounds
    assert ("disk_bytes_s" in measures) == ("bare disk" in console.file.getvalue()) == (source == "disk")  # type: ignore[attr-defined]
    assert measures["bound_s"] >= max(measures["resident_step_s"], measures["streamed_bytes"] / measures["raw_bytes_s"])
    assert 0 < measures["weights_bytes"] < sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert peer.not_run is not None
    assert "GPUs alone" in peer.not_run
    kept = json.loads(data.read_text())["reports"][0]
    assert kept["command"].startswith(f"mball bench layers {model.name} --device cpu --share 0.5 --source {source}")
    assert "wanted: 1.12" in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"| {MBALL} |" in (tmp_path / "layers.md").read_text()
    assert ACCELERATE in (tmp_path / "layers.md").read_text()


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, (2, 1)), (0.75, (4, 3)), (1.0, (1, 1)), (0.66, (3, 2)), (0.001, (8, 1))]
)
def test_a_share_of_the_layers_is_some_of_every_group(share: float, expected: tuple[int, int]) -> None:
    assert groups(share) == expected


def test_a_step_is_what_a_further_token_takes() -> None:
    asked: list[int] = []

    def generate(tokens: int) -> float:
        asked.append(tokens)
        return 3.0 + 0.25 * tokens

    step_s, steps = step_time(generate, 40, 5.0)
    assert (step_s, steps) == (pytest.approx(0.25), 8)
    assert max(asked) == 9


def test_the_bare_disk_is_read_where_it_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * CHUNK_BYTES))
    stretches = [Stretch(str(file), 5000, CHUNK_BYTES), Stretch(str(file), CHUNK_BYTES + 77, 2 * CHUNK_BYTES - 77)]
    try:
        found = rates(stretches, 5.0)
    except Cannot as error:
        if "O_DIRECT" not in str(error):
            raise
        missing("o-direct", str(error))
    assert min(found.values()) > 0


def test_the_best_depth_is_that_of_the_highest_mean() -> None:
    assert best([{1: 5.0, 4: 6.0}, {1: 9.0, 4: 7.0}]) == (1, 7.0)


def test_wrong_arguments(model: Path) -> None:
    for arguments in (["--source", "tape"], ["--peers", "nobody"], ["--share", "2"]):
        result = CliRunner().invoke(app, ["layers", str(model), *arguments])
        assert isinstance(result.exception, ConfigError), arguments
