from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mball.errors import ConfigError
from mball.loader.checkpoint import Checkpoint
from mball.server.models import architectures, random
from mball.server.models.architectures import Architecture
from mball.units import GiB, MiB

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_what_is_written(architecture: Architecture, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    written = random.make(architecture, folder, size_bytes=8 * MiB, max_shard_bytes=3 * MiB)
    assert abs(written / (8 * MiB) - 1) < 0.02
    assert len(list(folder.glob("*.safetensors"))) >= 3
    assert Checkpoint.open(folder).nbytes == written
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert type(model).__name__ in (folder / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello, wörld!"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
    assert torch.isfinite(model(answer[None]).logits).all()
    assert tokenizer.decode(answer[-8:])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.integers(4 * MiB, 600 * GiB), st.sampled_from(["bfloat16", "float32"]))
def test_any_size_is_met_within_two_percent(
    architecture: Architecture, size_bytes: int, dtype: architectures.Dtype
) -> None:
    shape = architectures.fit(architecture, size_bytes, dtype)
    itemsize = 4 if dtype == "float32" else 2
    assert abs(architectures.parameters(shape) * itemsize / size_bytes - 1) <= 0.02
    assert shape.num_attention_heads % shape.num_key_value_heads == 0
    assert shape.num_hidden_layers >= 1


def test_parameters_is_the_sum_of_the_tensors() -> None:
    shape = architectures.fit("qwen3-moe", 64 * MiB, "bfloat16")
    assert architectures.parameters(shape) == sum(spec.nbytes for spec in architectures.tensors(shape, "U8"))


def test_the_seed_alone_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        random.make("llama", tmp_path / name, size_bytes=8 * MiB, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")


def test_tensors_differ_from_each_other(tmp_path: Path) -> None:
    random.make("llama", tmp_path / "m", size_bytes=8 * MiB)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    layers = model.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))


def test_a_tokenizer_is_copied(tmp_path: Path) -> None:
    random.make("llama", tmp_path / "a", size_bytes=8 * MiB)
    random.make("qwen3", tmp_path / "b", size_bytes=16 * MiB, tokenizer_from=tmp_path / "a")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="holds something already"):
        random.make("llama", tmp_path, size_bytes=8 * MiB)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_failed_making_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        random.make("llama", tmp_path / "m", size_bytes=8 * MiB, tokenizer_from=tmp_path / "none")
    with pytest.raises(ConfigError, match="no shape is within 2 %"):
        random.make("llama", tmp_path / "m", size_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """600 MiB are written by a process that may map 200 MiB more than it has after its imports."""
    script = f"""
import resource, pathlib
from mball.server.models import random
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * {resource.getpagesize()} + {200 * MiB},) * 2)
random.make("llama", pathlib.Path({str(tmp_path / "m")!r}), size_bytes={600 * MiB})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert Checkpoint.open(tmp_path / "m").nbytes > 580 * MiB
