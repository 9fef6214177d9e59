"""A model larger than the memory that its process may have answers from the disk; whole it is refused, and told why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.mixtral import MixtralConfig

from mball.loader.checkpoint import Checkpoint

_ANSWER = """
import json, resource, sys
from pathlib import Path
from mball.device.account import OpenAccount
from mball.errors import MballError
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from tests.server.engine.driving import Run

path, options, more = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
if more:
    lines = Path("/proc/self/status").read_text().splitlines()
    (data,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")]
    resource.setrlimit(resource.RLIMIT_DATA, (data + more, data + more))
try:
    engine = open_engine(WorkerSpec("m", path, threads=1, max_num_seqs=1, max_model_len=64, **options), OpenAccount())
    engine.promote(None)
except (MballError, OSError, RuntimeError) as error:
    print(json.dumps({"refused": f"{type(error).__name__}: {error}"}))
    sys.exit()
run = Run(engine, "r", [5, 6, 7], max_tokens=6, logprobs=2).wait()
print(json.dumps({"error": run.error, "logprobs": [[o.token_id, o.logprob.logprob] for o in run.outputs if o.logprob]}))
sys.stdout.flush()
engine.close()
"""

SMALL = {"vocab_size": 256, "num_attention_heads": 8, "initializer_range": 0.1}
CONFIGS: dict[str, Any] = {
    "resident_layers": lambda: LlamaConfig(**SMALL, hidden_size=768, intermediate_size=2048, num_hidden_layers=14),
    "resident_experts": lambda: MixtralConfig(
        **SMALL,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_key_value_heads=4,
        num_local_experts=8,
    ),
}
"""Some 380 MiB in layers of 27 MiB, and 310 MiB, most of which are experts of 6 MiB."""


@pytest.mark.parametrize("option", ["resident_layers", "resident_experts"])
def test_a_model_larger_than_its_limit_of_private_memory(option: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(CONFIGS[option](), dtype=torch.float32).save_pretrained(tmp_path)
    # Three fifths are to do for everything beside what was there once all was imported, threads' stacks included.
    limit_bytes = Checkpoint.open(tmp_path).nbytes * 3 // 5
    expected = answer(tmp_path, {})
    assert expected["error"] is None
    refused = answer(tmp_path, {}, limit_bytes)["refused"]
    assert "DeviceError: cpu: 3" in refused
    assert "Cannot allocate memory" in refused
    assert "resident_layers: auto" in refused
    assert answer(tmp_path, {option: 0}, limit_bytes) == expected


def answer(path: Path, options: dict[str, Any], more_bytes: int = 0) -> dict[str, Any]:
    """What a process of its own says of a model; with `more_bytes` it may have so much private memory beside what it
    has once everything is imported."""
    command = [sys.executable, "-c", _ANSWER, str(path), json.dumps(options), str(more_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))
