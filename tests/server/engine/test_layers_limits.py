"""A model larger than the memory that its process may have answers from the disk, and whole it does not even start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from mball.loader.checkpoint import Checkpoint
from mball.units import MiB

_ANSWER = """
import json, resource, sys
from pathlib import Path
from mball.device.account import OpenAccount
from mball.errors import MballError
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from tests.server.engine.driving import Run

path, wish, more = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
if more:
    lines = Path("/proc/self/status").read_text().splitlines()
    (data,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")]
    resource.setrlimit(resource.RLIMIT_DATA, (data + more, data + more))
try:
    spec = WorkerSpec("m", path, threads=1, resident_layers=wish, max_num_seqs=1, max_model_len=64)
    engine = open_engine(spec, OpenAccount())
    engine.promote(None)
except (MballError, OSError, MemoryError) as error:
    print(json.dumps({"refused": f"{type(error).__name__}: {error}"}))
    sys.exit()
run = Run(engine, "r", [5, 6, 7], max_tokens=4, logprobs=2).wait()
print(json.dumps({"error": run.error, "logprobs": [[o.token_id, o.logprob.logprob] for o in run.outputs if o.logprob]}))
sys.stdout.flush()
engine.close()
"""


def answer(path: Path, wish: int | None, more_bytes: int = 0, under: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a process of its own, started by the command `under`, says of a model; with `more_bytes` it may have so much
    private memory beside what it has once everything is imported."""
    command = [*under, sys.executable, "-c", _ANSWER, str(path), json.dumps(wish), str(more_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    if done.returncode != 0:
        return {"ended": done.returncode, "said": done.stderr[-500:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def model(folder: Path, num_layers: int) -> int:
    """Of 27 MiB a layer; its bytes."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256, hidden_size=768, intermediate_size=2048, num_hidden_layers=num_layers, num_attention_heads=12
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return Checkpoint.open(folder).nbytes


def test_a_model_larger_than_its_limit_of_private_memory(tmp_path: Path) -> None:
    nbytes = model(tmp_path, 14)
    expected = answer(tmp_path, None)
    assert expected["error"] is None
    limit_bytes = nbytes * 5 // 8
    assert "refused" in answer(tmp_path, None, limit_bytes), "the limit holds"
    assert answer(tmp_path, 0, limit_bytes) == expected


def test_a_model_larger_than_its_cgroup(tmp_path: Path) -> None:
    """All counts there: imports, the page cache, what threads read through."""
    limit_bytes = 1024 * MiB
    under = ("systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0")
    if shutil.which("systemd-run") is None:
        pytest.skip("no cgroup can be made here: there is no systemd-run")
    probe = subprocess.run([*under, "true"], capture_output=True, text=True, check=False, timeout=60)
    if probe.returncode != 0:
        pytest.skip(f"no cgroup can be made here: {probe.stderr.strip()[:200]}")
    assert model(tmp_path, 44) > limit_bytes
    expected = answer(tmp_path, None)
    assert expected["error"] is None
    assert "ended" in answer(tmp_path, None, under=under), "the limit holds: all of it is killed there"
    assert answer(tmp_path, 0, under=under) == expected
