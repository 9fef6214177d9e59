import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mball.bench.cli import app
from mball.bench.contenders import LOADERS, Spec, file_backed_bytes, main
from mball.bench.load import run_load
from mball.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(
        folder, max_shard_size="20KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_all_contenders_on_a_real_model(model: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    page, data = tmp_path / "docs" / "load.md", tmp_path / "load.json"
    page.parent.mkdir()
    report = run_load(
        model, rounds=1, json_path=data, plot_path=tmp_path / "docs" / "load", markdown_path=page, console=console
    )
    assert [outcome.name for outcome in report.outcomes] == list(LOADERS)
    for outcome in report.outcomes:
        assert outcome.not_run is None
        assert outcome.facts["compared"] > 10
        assert outcome.facts["file_backed_bytes"] == 0
        assert len(outcome.rounds) == 1
    assert json.loads(data.read_text())["outcomes"][0]["rounds"][0]["first_s"] > 0
    assert "![" in page.read_text()
    assert "(load.svg)" in page.read_text()
    assert (page.parent / "load.svg").exists()
    assert "GiB/s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_peer_that_cannot_load_the_model_says_why(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    report = run_load(tmp_path, rounds=1, peers=["transformers"], console=Console(file=io.StringIO()))
    assert {outcome.name: outcome.not_run for outcome in report.outcomes} == {
        "mball": None,
        "transformers": "the model has no config.json",
    }


def test_wrong_arguments(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="no such peer: nobody"):
        run_load(tmp_path, peers=["nobody"])
    with pytest.raises(CheckpointError):
        run_load(tmp_path / "none")


def test_the_check_sees_a_wrong_byte(model: Path) -> None:
    before = main(Spec("mball", str(model), "check").command()[-1])["digests"]
    assert before == main(Spec("safetensors", str(model), "check").command()[-1])["digests"]
    path = sorted(model.glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = main(Spec("mball", str(model), "check").command()[-1])["digests"]
    path.write_bytes(content)
    assert sum(before[name] != after[name] for name in before) == 1


def test_tensors_that_are_pages_of_a_file_are_counted(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5000), "b": torch.ones(7)}, tmp_path / "m.safetensors")
    mapped = load_file(tmp_path / "m.safetensors")
    assert file_backed_bytes(mapped) == 20_028
    assert file_backed_bytes({name: tensor.clone() for name, tensor in mapped.items()}) == 0


def test_the_command(model: Path, tmp_path: Path) -> None:
    arguments = ["load", str(model), "--rounds", "1", "--peers", "safetensors", "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "safetensors" in result.output
    command = json.loads((tmp_path / "out.json").read_text())["command"]
    assert command == f"mball bench load {model} --rounds 1 --peers safetensors"


@pytest.mark.benchmark
def test_three_times_the_rate_of_load_file_and_clone(tmp_path: Path) -> None:
    save_file(
        {f"w{number}": torch.randn(4096, 4096).bfloat16() for number in range(44)}, tmp_path / "model.safetensors"
    )
    report = run_load(tmp_path, rounds=5, peers=["safetensors"], console=Console(file=io.StringIO()))
    seconds = {
        outcome.name: sorted(measures["first_s"] for measures in outcome.rounds)[2] for outcome in report.outcomes
    }
    assert seconds["safetensors"] / seconds["mball"] >= 3
