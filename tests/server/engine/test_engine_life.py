"""What happens around the answers: cancelling, failures, moves, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mball.errors import DeviceOutOfMemory, TransitionError
from mball.server.engine.api import GenerateRequest, Output, SamplingParams
from tests.server.engine.driving import EngineFor, ModelDir, Oracle, Run, prompts, reference, run_all

MIXED = prompts(6)

BLOCK_BYTES = 4 * 3 * 2 * 2 * 8 * 4
"""4 tokens of 3 layers, keys and values of 2 heads of 8 floats: the tiny Llama's block."""


class SmallDevice:
    """An account with a device of `total_bytes`."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.taken_bytes = 0

    def take(self, nbytes: int) -> None:
        if self.taken_bytes + nbytes > self.total_bytes:
            raise DeviceOutOfMemory("small", nbytes, self.total_bytes - self.taken_bytes, self.total_bytes)
        self.taken_bytes += nbytes

    def give(self, nbytes: int) -> None:
        self.taken_bytes -= nbytes
        assert self.taken_bytes >= 0


def test_abort_frees_the_slot_and_leaves_the_others_alone(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    engine = engine_for(path, max_num_seqs=2)
    endless = Run(engine, "endless", MIXED[0], max_tokens=230)
    other = Run(engine, "other", MIXED[1], max_tokens=100)
    queued = Run(engine, "queued", MIXED[2], max_tokens=5)
    assert endless.first.wait(60)
    engine.abort("endless")
    engine.abort("nobody")
    assert endless.wait().reason == "abort"
    assert len(endless.tokens) < 230
    assert queued.wait().tokens == reference(oracle(path), MIXED[2], 5)[0]
    assert other.wait().tokens == reference(oracle(path), MIXED[1], 100)[0]
    assert engine.status().kv_blocks_free == engine.status().kv_blocks_total


def test_abort_of_a_waiting_sequence(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"), max_num_seqs=1)
    first = Run(engine, "first", MIXED[0], max_tokens=200)
    waiting = Run(engine, "waiting", MIXED[1])
    engine.abort("waiting")
    assert waiting.wait().reason == "abort"
    assert waiting.tokens == []
    engine.abort("first")
    assert first.wait().reason == "abort"


def test_nan_ends_its_own_sequence_and_poisons_no_other(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama_untied_gqa1")
    engine = engine_for(path)
    with torch.no_grad():
        engine._weights.module.model.embed_tokens.weight[150] = float("nan")
    clean = [[token for token in prompt if token != 150] for prompt in MIXED]
    expected = [reference(oracle(path), prompt, 12)[0] for prompt in clean]
    assert not any(150 in tokens for tokens in expected)
    for _ in range(2):  # the second time on blocks that held NaN
        runs = run_all(engine, [*clean, [5, 150, 7], [150] * 30])
        assert [run.tokens for run in runs[:-2]] == expected
        for poisoned in runs[-2:]:
            assert poisoned.tokens == []
            assert poisoned.reason == "error"
            assert "finite" in (poisoned.error or "")
    # The first block still holds NaN while the shorter of two others is padded: nobody takes a new block meanwhile.
    apart = [[7], [9] * 9]
    expected = [reference(oracle(path), prompt, 3)[0] for prompt in apart]
    assert [run.tokens for run in run_all(engine, [[150] * 5, *apart], max_tokens=3)][1:] == expected


def test_a_failed_step_ends_its_sequences_and_the_engine_goes_on(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    engine = engine_for(path)
    failing = threading.Event()

    def hook(module: torch.nn.Module, args: object) -> None:
        if failing.is_set():
            raise RuntimeError("planted")

    engine._weights.module.register_forward_pre_hook(hook)
    running = Run(engine, "running", MIXED[0], max_tokens=200)
    assert running.first.wait(60)
    failing.set()
    assert running.wait().reason == "error"
    assert "planted" in (running.error or "")
    assert "planted" in (engine.status().error or "")
    assert engine.status().kv_blocks_free == engine.status().kv_blocks_total
    failing.clear()
    assert Run(engine, "next", MIXED[1]).wait().tokens == reference(oracle(path), MIXED[1], 12)[0]
    assert engine.status().error is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_ended_says_so_and_leaves_nobody_waiting(
    model_dir: ModelDir, engine_for: EngineFor
) -> None:
    class Unforeseen(BaseException):
        pass

    engine = engine_for(model_dir("llama"), max_num_seqs=1)
    running = Run(engine, "running", MIXED[0], max_tokens=200)
    waiting = Run(engine, "waiting", MIXED[1], max_tokens=200)
    assert running.first.wait(60)

    def hook(module: torch.nn.Module, args: object) -> None:
        raise Unforeseen

    engine._weights.module.register_forward_pre_hook(hook)
    assert [run.wait().reason for run in (running, waiting)] == ["error", "error"]
    assert "thread ended" in (engine.status().error or "")
    assert Run(engine, "late", MIXED[1]).wait().reason == "error"
    engine.demote()
    with pytest.raises(TransitionError, match="restart its worker"):
        engine.promote(None)


def test_a_listener_that_is_gone_ends_its_sequence_alone(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"))

    def closed(output: Output) -> None:
        raise RuntimeError("Event loop is closed")

    engine.submit(GenerateRequest("gone", MIXED[0], SamplingParams(max_tokens=200, seed=1)), closed)
    assert Run(engine, "other", MIXED[1]).wait().reason == "length"
    assert engine.status().running == 0
    assert engine.status().error is None


def test_demote_aborts_what_still_runs_and_refuses_what_comes_after(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"), max_num_seqs=2)
    runs = [Run(engine, f"r{index}", prompt, max_tokens=200) for index, prompt in enumerate(MIXED[:4])]
    assert runs[0].first.wait(60)
    demoted = engine.demote()
    assert [run.reason for run in runs] == ["abort"] * 4
    status = engine.status()
    assert (status.resident, status.running, status.waiting, status.weights_bytes, status.kv_bytes) == (
        False,
        0,
        0,
        0,
        0,
    )
    assert demoted.released_bytes > 0
    late = Run(engine, "late", MIXED[0]).wait()
    assert (late.reason, late.tokens) == ("error", [])
    assert "not on its device" in (late.error or "")
    assert engine.demote().released_bytes == 0


def test_a_promotion_that_does_not_fit_leaves_nothing_held(model_dir: ModelDir, engine_for: EngineFor) -> None:
    path = model_dir("llama")
    device = SmallDevice(1 << 40)
    engine = engine_for(path, account=device, promote=False)
    assert device.taken_bytes == 0
    promoted = engine.promote(None)
    assert device.taken_bytes == promoted.weights_bytes + promoted.kv_bytes
    with pytest.raises(TransitionError, match="already"):
        engine.promote(None)
    assert engine.demote().released_bytes == promoted.weights_bytes + promoted.kv_bytes
    assert device.taken_bytes == 0
    for total_bytes in (promoted.weights_bytes - 1, promoted.weights_bytes + promoted.kv_bytes - 1):
        device.total_bytes = total_bytes
        with pytest.raises(DeviceOutOfMemory):
            engine.promote(None)
        assert device.taken_bytes == 0
        assert not engine.status().resident
        assert engine.status().weights_bytes == 0
    device.total_bytes = promoted.weights_bytes + promoted.kv_bytes
    engine.promote(None)
    assert Run(engine, "again", MIXED[0]).wait().reason == "length"


def test_close_ends_the_thread_and_its_sequences(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"))
    run = Run(engine, "running", MIXED[0], max_tokens=200)
    assert run.first.wait(60)
    engine.close()
    assert run.wait().reason == "abort"
    assert not engine._thread.is_alive()
    with pytest.raises(TransitionError):
        engine.promote(None)


def test_submitting_from_many_threads(model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor) -> None:
    path = model_dir("llama")
    engine = engine_for(path, max_num_seqs=4, kv_cache_bytes=60 * BLOCK_BYTES, max_model_len=64)
    expected = [reference(oracle(path), prompt, 12)[0] for prompt in MIXED]
    wrong: list[str] = []

    def client(number: int) -> None:
        for turn in range(5):
            index = (number + turn) % len(MIXED)
            run = Run(engine, f"{number}-{turn}", MIXED[index])
            if turn == 3:
                engine.abort(f"{number}-{turn}")
            run.wait()
            if run.reason == "length" and run.tokens != expected[index]:
                wrong.append(f"{number}-{turn}")

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(120)
    assert not any(thread.is_alive() for thread in clients)
    assert wrong == []
    status = engine.status()
    assert (status.running, status.waiting, status.kv_blocks_free) == (0, 0, status.kv_blocks_total)


MEMORY = """
import ctypes, json, sys
from pathlib import Path
from mball.device.account import OpenAccount
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from tests.server.engine.driving import run_all

def private():
    ctypes.CDLL(None).malloc_trim(0)
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))

engine = open_engine(WorkerSpec("tiny", sys.argv[1], "", "cpu", threads=1, max_num_seqs=4), OpenAccount())
idle = private()
found = []
for _ in range(3):
    promoted = engine.promote(None)
    run_all(engine, [[5] * 100] * 4, max_tokens=20)
    there = private() - idle
    engine.demote()
    found.append((there, private() - idle, promoted.weights_bytes))
engine.close()
print(json.dumps(found))
"""


def test_a_demoted_engine_falls_back_to_its_idle_memory(model_dir_wide: Path) -> None:
    environment = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, str(model_dir_wide)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
    ).stdout
    rounds: list[list[int]] = json.loads(output.splitlines()[-1])
    for there, after, weights_bytes in rounds:
        assert there > weights_bytes
        assert after < 0.35 * weights_bytes, f"{after} bytes stay of {weights_bytes}"
    assert rounds[2][1] - rounds[0][1] < 2 << 20, "every swap leaves some bytes behind"
