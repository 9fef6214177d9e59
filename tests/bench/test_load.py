import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mball.bench.baselines import DISK_BUFFERED, DISK_DIRECT
from mball.bench.cli import app
from mball.bench.contenders import CONTENDERS, PEERS, Loader, Spec, prepare
from mball.bench.load import Settings, run_load
from mball.bench.measure import digests, file_backed_bytes, on_cpu, reference_digests
from mball.bench.report import Report
from mball.errors import BadManifest, CheckpointError, ConfigError
from mball.loader import Checkpoint
from mball.loader.manifest import Manifest


def quiet(model: Path, settings: Settings, **paths: Path) -> list[Report]:
    return run_load(model, settings, console=Console(file=io.StringIO()), **paths)


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


def test_warm_on_a_real_model(model: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    page, data = tmp_path / "docs" / "load.md", tmp_path / "load.json"
    page.parent.mkdir()
    (report,) = run_load(
        model,
        Settings(rounds=1),
        json_path=data,
        plot_path=tmp_path / "docs" / "load",
        markdown_path=page,
        console=console,
    )
    assert [outcome.name for outcome in report.outcomes] == ["mball", "safetensors", "transformers"]
    for outcome in report.outcomes:
        assert outcome.not_run is None
        assert outcome.facts["compared"] > 10
        assert outcome.facts["file_backed_bytes"] == 0
        assert len(outcome.rounds) == 1
        assert outcome.rounds[0]["steady_s"] > 0
    assert json.loads(data.read_text())["reports"][0]["outcomes"][0]["rounds"][0]["first_s"] > 0
    assert "![" in page.read_text()
    assert "(load.svg)" in page.read_text()
    assert (page.parent / "load.svg").exists()
    assert "GiB/s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_cold_and_image_states(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "load.json"
    before = set(tmp_path.iterdir())
    settings = Settings(states=("cold", "image"), peers=("safetensors",), rounds=1, copies=tmp_path, cores=(0,))
    cold, image = quiet(model, settings, json_path=data)
    names = ["mball", "mball, filling its image", "safetensors", DISK_DIRECT, DISK_BUFFERED]
    assert [outcome.name for outcome in cold.outcomes] == names
    assert [outcome.name for outcome in image.outcomes] == ["mball, image"]
    for outcome in (*cold.outcomes, *image.outcomes):
        assert outcome.not_run is None, outcome
        assert len(outcome.rounds) == 1
    assert all("steady_s" not in outcome.rounds[0] for outcome in cold.outcomes)
    assert image.outcomes[0].facts["compared"] > 10
    assert set(tmp_path.iterdir()) == {*before, data}
    assert cold.setting == {"state": "cold", "device": "cpu", "cores": "0", "verify": ""}
    assert "--cores 0" in cold.command
    assert len(json.loads(data.read_text())["reports"]) == 2
    assert len(os.sched_getaffinity(0)) == os.cpu_count() or os.cpu_count() == 1


def test_peers_that_cannot_load_the_model_say_why(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    (report,) = quiet(tmp_path, Settings(rounds=1, peers=("transformers", "runai")))
    assert {outcome.name: outcome.not_run for outcome in report.outcomes} == {
        "mball": None,
        "transformers": "the model has no config.json",
        "runai": "it is measured on GPUs alone",
    }


def test_a_peer_that_is_not_installed_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mball.bench import contenders

    monkeypatch.setitem(sys.modules, "instanttensor", None)
    spec = Spec("instanttensor", str(model), device="cuda:0")
    assert "not installed (" in contenders.main(spec.command()[-1])["cannot"]


def test_wrong_arguments(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="--peers: no nobody"):
        quiet(tmp_path, Settings(peers=("nobody",)))
    with pytest.raises(ConfigError, match="--state: no lukewarm"):
        quiet(tmp_path, Settings(states=("lukewarm",)))
    with pytest.raises(ConfigError, match="may not run on 4096"):
        quiet(tmp_path, Settings(cores=(4096,)))
    with pytest.raises(CheckpointError):
        quiet(tmp_path / "none", Settings())


def test_the_command_that_is_kept_says_it_all(tmp_path: Path) -> None:
    settings = Settings(
        device="cuda:0",
        states=("warm", "cold"),
        peers=("runai",),
        cores=(0, 1),
        rounds=3,
        threads=4,
        limit_s=30.0,
        verify=True,
    )
    assert settings.command(Path("my model")) == (
        "mball bench load 'my model' --device cuda:0 --state warm,cold --rounds 3 --peers runai --cores 0,1 "
        "--threads 4 --limit 30 --verify"
    )


def test_every_contender_gives_what_safetensors_reads(model: Path) -> None:
    reference = reference_digests(sorted(model.glob("*.safetensors")))
    for name in ("mball", "mball, module", "safetensors", "transformers"):
        found = prepare(Spec(name, str(model)))(True)["digests"]
        assert found.keys() <= reference.keys()
        assert len(found) > 10
        assert all(reference[tensor] == digest for tensor, digest in found.items()), name


def test_the_digests_see_a_wrong_byte_dtype_and_shape(model: Path) -> None:
    reference = reference_digests(sorted(model.glob("*.safetensors")))
    path = sorted(model.glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = prepare(Spec("mball", str(model)))(True)["digests"]
    path.write_bytes(content)
    assert sum(reference[name] != after[name] for name in reference) == 1
    ones = digests({"a": torch.ones(4), "b": torch.ones(2, 2), "c": torch.ones(4).to(torch.int32)})
    assert len(set(ones.values())) == 3


def test_a_second_call_follows_the_release_of_the_first() -> None:
    calls: list[str] = []

    def load() -> dict[str, torch.Tensor]:
        calls.append("load")
        return {"a": torch.ones(3)}

    loader = Loader(load, release=lambda: calls.append("release"))
    result = on_cpu(loader, 12, digest=True)
    assert calls == ["load", "release", "load"]
    assert {"bytes", "first_s", "steady_s", "peak_bytes", "facts", "digests"} == result.keys()
    assert "steady_s" not in on_cpu(loader, 12, limit_s=0.0)
    assert "steady_s" in on_cpu(loader, 12, limit_s=60.0)


def test_verified_loads(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadManifest):
        prepare(Spec("mball", str(model), verify=True))
    checkpoint = Checkpoint.open(model)
    path = Manifest.make(checkpoint).write(checkpoint)
    try:
        (report,) = quiet(model, Settings(peers=(), rounds=1, verify=True))
        assert report.outcomes[0].not_run is None
        assert "every byte verified" in report.title
    finally:
        path.unlink()


def test_what_is_measured_has_a_name() -> None:
    assert set(PEERS) < set(CONTENDERS)


def test_tensors_that_are_pages_of_a_file_are_counted(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5000), "b": torch.ones(7)}, tmp_path / "m.safetensors")
    mapped = load_file(tmp_path / "m.safetensors")
    assert file_backed_bytes(mapped) == 20_028
    assert file_backed_bytes({name: tensor.clone() for name, tensor in mapped.items()}) == 0


def test_the_command_and_the_page(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "out.json"
    arguments = ["load", str(model), "--rounds", "1", "--peers", "safetensors", "--json", str(data)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "safetensors" in result.output
    command = json.loads(data.read_text())["reports"][0]["command"]
    assert command == f"mball bench load {model.name} --rounds 1 --peers safetensors"
    result = CliRunner().invoke(app, ["page", str(tmp_path / "out.md"), str(data), str(data)])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out.md").read_text()
    assert page.startswith("# Loading weights")
    assert "(out-1.svg)" in page
    assert "(out-2.svg)" in page
    assert (tmp_path / "out-2.svg").exists()
    wrong = CliRunner().invoke(app, ["load", str(model), "--cores", "a"])
    assert isinstance(wrong.exception, ConfigError)


@pytest.mark.benchmark
def test_three_times_the_rate_of_load_file_and_clone(tmp_path: Path) -> None:
    save_file(
        {f"w{number}": torch.randn(4096, 4096).bfloat16() for number in range(44)}, tmp_path / "model.safetensors"
    )
    (report,) = quiet(tmp_path, Settings(rounds=5, peers=("safetensors",)))
    seconds = {
        outcome.name: sorted(measures["first_s"] for measures in outcome.rounds)[2] for outcome in report.outcomes
    }
    assert seconds["safetensors"] / seconds["mball"] >= 3
