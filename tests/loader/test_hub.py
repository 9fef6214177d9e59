from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from mball.errors import SourceUnavailable, UnsupportedCheckpoint
from mball.loader import load, load_into
from mball.loader.hub import resolve


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A hub's cache that holds one model, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("a" * 40)
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    tensors = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    save_file(tensors, snapshot / "model.safetensors")
    return tensors


def test_a_cached_model_is_loaded_by_its_id_offline(cached: dict[str, torch.Tensor]) -> None:
    loaded = load("someone/tiny")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
        name: tensor.tolist() for name, tensor in cached.items()
    }
    with init_empty_weights():
        linear = nn.Linear(4, 3)
    weights = load_into(linear, "someone/tiny", device="cpu")
    assert torch.equal(linear.weight, cached["weight"])
    assert weights.nbytes >= linear.weight.nbytes


def test_what_is_not_cached_says_so(cached: dict[str, torch.Tensor]) -> None:
    with pytest.raises(SourceUnavailable, match=r"someone/other.*hub"):
        load("someone/other")


def test_a_path_stays_a_path(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve("./a/b/c") == Path("a/b/c")
    with pytest.raises(UnsupportedCheckpoint, match="no such file"):
        load(tmp_path / "none")
