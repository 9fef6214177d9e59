from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mball.errors import MballError
from mball.loader.checkpoint import Checkpoint
from mball.server.models.demo import CHAT_MODELS, EMBEDDING_MODEL, prepare

ROOT = Path(__file__).parents[3]
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")


@pytest.fixture(scope="module")
def models() -> Path:
    folder = ROOT / ".demo" / "models"
    subprocess.run([sys.executable, "-m", "mball", "models", "prepare-demo", str(folder)], check=True, timeout=900)
    return folder


def answer(folder: Path, question: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def test_the_chat_models_answer_sensibly_and_differently(models: Path) -> None:
    answers = {name: [answer(models / name, question) for question in QUESTIONS] for name in CHAT_MODELS}
    for name, (france, sky) in answers.items():
        assert "Paris" in france or "France" in france, (name, france)
        assert any(word in sky.lower() for word in ("sky", "light", "atmosphere")), (name, sky)
    assert len({tuple(texts) for texts in answers.values()}) == len(CHAT_MODELS)
    assert len({texts[1] for texts in answers.values()}) == len(CHAT_MODELS)


@pytest.mark.parametrize(
    ("name", "dtype", "layers"),
    [(CHAT_MODELS[0], "BF16", 30), (CHAT_MODELS[1], "BF16", 27), (CHAT_MODELS[2], "F32", 30)],
)
def test_a_chat_model_is_sharded_and_of_its_dtype(models: Path, name: str, dtype: str, layers: int) -> None:
    checkpoint = Checkpoint.open(models / name)
    assert len(checkpoint.shards) >= 3
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {dtype}
    assert "lm_head.weight" not in checkpoint.tensors
    config = json.loads((models / name / "config.json").read_text())
    assert config["num_hidden_layers"] == layers
    assert (models / name / "README.md").read_text().startswith(f"# {name}\n")


def test_the_tokenizer_takes_digits_one_by_one(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / CHAT_MODELS[0])
    assert [tokenizer.decode(token) for token in tokenizer("in 2024!").input_ids] == [
        "in",
        " ",
        "2",
        "0",
        "2",
        "4",
        "!",
    ]
    text = "a  b\n\tc – héllo 日本 🎈"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.model_max_length == 8192


def test_the_embedding_model_finds_what_is_near(models: Path) -> None:
    folder = models / EMBEDDING_MODEL
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = ["A cat sits on the mat.", "A kitten is on a rug.", "The stock market fell today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]


def test_what_is_whole_is_kept_and_what_is_not_is_made_anew(models: Path, tmp_path: Path) -> None:
    kept = CHAT_MODELS
    for name in kept:
        (tmp_path / name).symlink_to(models / name)
    half = tmp_path / EMBEDDING_MODEL
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".making-old").mkdir()
    assert prepare(tmp_path) == [EMBEDDING_MODEL]
    assert Checkpoint.open(half).nbytes > 80 * 10**6
    assert prepare(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, EMBEDDING_MODEL, ".lock"])


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MballError, match="another process"):
            prepare(tmp_path)


def test_a_failed_download_leaves_no_model(tmp_path: Path) -> None:
    code = "from mball.server.models.cli import app; app()"
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare-demo", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "SourceUnavailable" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
