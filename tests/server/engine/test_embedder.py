"""Embeddings against a plain forward pass pooled by hand."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel
from transformers.models.bert import BertConfig, BertForMaskedLM

from mball.device.account import OpenAccount
from mball.errors import InvalidRequest, Unavailable, UnsupportedCheckpoint
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from mball.server.engine.embedder import EmbedEngine
from mball.server.engine.pooling import Pooling
from tests.server.engine.driving import prompts

MIXED = prompts(9, longest=30)


def open_embedder(path: Path, **options: Any) -> EmbedEngine:
    engine = open_engine(WorkerSpec("enc", str(path), "", "cpu", task="embed", threads=1, **options), OpenAccount())
    assert isinstance(engine, EmbedEngine)
    return engine


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=199, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(path)
    return path


def by_hand(path: Path, prompt: list[int], mode: str, normalize: bool) -> torch.Tensor:
    model = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1], "max": hidden.max(0).values}[mode]
    return pooled / pooled.norm() if normalize else pooled


def with_modules(path: Path, to: Path, mode: dict, normalize: bool) -> Path:
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).symlink_to(file)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (to / "modules.json").write_text(json.dumps(modules[: 3 if normalize else 2]))
    (to / "1_Pooling").mkdir()
    (to / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | mode))
    return to


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("mean", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}),
        ("cls", {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}),
        ("lasttoken", {"pooling_mode": "lasttoken"}),
        ("max", {"pooling_mode_max_tokens": True}),
    ],
)
def test_a_padded_batch_equals_each_input_pooled_by_hand(
    name: str, mode: dict[str, Any], normalize: bool, bert: Path, tmp_path: Path
) -> None:
    path = with_modules(bert, tmp_path / "model", mode, normalize)
    engine = open_embedder(path, max_num_seqs=4, max_num_batched_tokens=64)
    try:
        engine.promote(None)
        found = torch.tensor(engine.embed(MIXED))
        expected = torch.stack([by_hand(bert, prompt, name, normalize) for prompt in MIXED])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert engine.hidden_size == found.shape[1] == 32
        engine.demote()
        with pytest.raises(Unavailable, match="not on its device"):
            engine.embed(MIXED)
        assert engine.status().weights_bytes == 0
        engine.promote(None)
        assert torch.equal(torch.tensor(engine.embed(MIXED)), found)
    finally:
        engine.close()


def test_the_demo_model_is_normalised_mean_pooling(minilm: Path) -> None:
    engine = open_embedder(minilm)
    try:
        assert engine.max_model_len == 256
        engine.promote(None)
        inputs = [[101, 7592, 2088, 102], [101, 102], [101, *range(2000, 2200), 102]]
        found = torch.tensor(engine.embed(inputs))
        torch.testing.assert_close(found[0], by_hand(minilm, inputs[0], "mean", True), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[2], by_hand(minilm, inputs[2], "mean", True), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    finally:
        engine.close()


def test_inputs_that_cannot_be_embedded_are_refused(bert: Path) -> None:
    engine = open_embedder(bert)
    try:
        engine.promote(None)
        for wrong, says in (([[5] * 65], "65 tokens"), ([[5], []], "input 1"), ([[199]], "vocabulary")):
            with pytest.raises(InvalidRequest, match=says):
                engine.embed(wrong)
        assert engine.embed([]) == []
    finally:
        engine.close()


def test_callers_on_many_threads_each_get_their_own(bert: Path) -> None:
    engine = open_embedder(bert)
    try:
        engine.promote(None)
        expected = [engine.embed([prompt])[0] for prompt in MIXED]
        found: dict[int, list[float]] = {}
        threads = [
            threading.Thread(target=lambda index=index: found.update({index: engine.embed([MIXED[index]])[0]}))
            for index in range(len(MIXED))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found[index] for index in range(len(MIXED))] == expected
    finally:
        engine.close()


def test_pooling_that_is_not_done_here_is_refused(bert: Path, tmp_path: Path) -> None:
    path = with_modules(bert, tmp_path / "model", {"pooling_mode_weightedmean_tokens": True}, False)
    with pytest.raises(UnsupportedCheckpoint, match="weightedmean"):
        Pooling.read(str(path))
    (path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]))
    with pytest.raises(UnsupportedCheckpoint, match="Dense"):
        Pooling.read(str(path))
