"""Models of which only a part is on the device: the same logprobs, bit by bit, whatever is resident."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from mball.device.account import OpenAccount
from mball.device.residency import resident_share
from mball.errors import ConfigError, DeviceOutOfMemory, TransitionError
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.memory.estimate import estimate
from mball.memory.spec import WorkerSpec
from mball.server.engine import footprint, open_engine
from mball.server.engine.balloon import share
from mball.server.engine.engine import GenerateEngine
from mball.swap.layers import LayeredWeights
from mball.units import MiB
from tests.server.engine.conftest import CONFIGS
from tests.server.engine.driving import EngineFor, ModelDir, Oracle, Run, prompts, reference
from tests.server.engine.test_engine_life import SmallDevice

LAYERS = 6
MIXED = prompts(6)
DEEP = ("llama", "qwen3_moe", "gemma2_softcap")


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of the tiny models, of six layers."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(11)
            config = CONFIGS[name]()
            config.num_hidden_layers = LAYERS
            if getattr(config, "layer_types", None):
                config.layer_types = [config.layer_types[n % 2] for n in range(LAYERS)]
            made[name] = tmp_path_factory.mktemp("deep") / name
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.save_pretrained(made[name], max_shard_size="100KB")
        return made[name]

    return make


def answers(engine: GenerateEngine, **sampling: Any) -> list[Any]:
    """Tokens and logprobs of sequences that run one after the other."""
    found: list[Any] = []
    for index, prompt in enumerate(MIXED):
        run = Run(engine, f"a{index}", prompt, logprobs=4, prompt_logprobs=True, **sampling).wait()
        assert run.error is None
        found.append([(output.token_id, output.logprob, output.top_logprobs) for output in run.outputs])
        found.append(run.outputs[0].prompt_logprobs)
    return found


@pytest.mark.parametrize("name", DEEP)
def test_logprobs_are_the_same_with_none_some_and_all_layers_resident(
    name: str, deep: ModelDir, engine_for: EngineFor
) -> None:
    expected = answers(engine_for(deep(name)))
    for wish, resident in ((0, 0), (1, 1), (3, 3), (5, LAYERS), (LAYERS, LAYERS), ("auto", LAYERS)):
        engine = engine_for(deep(name), resident_layers=wish)
        assert (engine.status().num_layers, engine.status().resident_layers) == (LAYERS, resident)
        assert answers(engine) == expected, wish
        engine.demote()


def test_the_checkpoint_s_dtype_need_not_be_the_served_one_on_the_cpu(deep: ModelDir, engine_for: EngineFor) -> None:
    expected = answers(engine_for(deep("llama"), dtype="bfloat16"))
    assert answers(engine_for(deep("llama"), dtype="bfloat16", resident_layers=1)) == expected


def test_a_batch_s_tokens_stay_while_layers_go_and_come(deep: ModelDir, oracle: Oracle, engine_for: EngineFor) -> None:
    path = deep("llama")
    engine = engine_for(path, resident_layers="auto", max_num_seqs=4)
    expected = [reference(oracle(path), prompt, 100)[0] for prompt in MIXED]
    weights = engine._weights.streamed
    assert weights is not None
    easy = engine.status().spare_bytes
    cell = weights.bytes_of(2) - weights.bytes_of(1)
    runs = [Run(engine, f"r{index}", prompt, max_tokens=100) for index, prompt in enumerate(MIXED)]
    sizes = cycle([easy + 4 * cell, 0, easy + cell, easy + 3 * cell, easy - 4096, easy + 2 * cell])
    seen: set[int] = set()
    while not all(run.done.is_set() for run in runs):
        engine.balloon(next(sizes))
        seen.add(engine.status().resident_layers)
        runs[-1].done.wait(0.02)
    assert [run.wait().tokens for run in runs] == expected
    assert {0, LAYERS} < seen
    engine.balloon(0)
    assert engine.status().resident_layers == LAYERS


def test_one_sequence_s_logprobs_stay_while_layers_go_and_come(deep: ModelDir, engine_for: EngineFor) -> None:
    path = deep("gemma2_softcap")
    options = {"max_tokens": 150, "logprobs": 3, "temperature": 0.9, "seed": 5}
    plain = Run(engine_for(path, max_num_seqs=1), "plain", MIXED[3], **options).wait()
    engine = engine_for(path, max_num_seqs=1, resident_layers="auto")
    easy, weights = engine.status().spare_bytes, engine._weights.streamed
    assert weights is not None
    whole = weights.bytes_of(LAYERS)
    run = Run(engine, "moved", MIXED[3], **options)
    cells = cycle([2, 6, 3, 5, 4])
    changes = 0
    while not run.done.is_set():
        engine.balloon(easy + whole - weights.bytes_of(next(cells)))
        changes += 1
        run.done.wait(0.01)
    assert changes > 4
    assert [(o.token_id, o.logprob, o.top_logprobs) for o in run.outputs] == [
        (o.token_id, o.logprob, o.top_logprobs) for o in plain.outputs
    ]


def test_the_account_and_the_status_follow(deep: ModelDir, engine_for: EngineFor) -> None:
    device = SmallDevice(1 << 40)
    engine = engine_for(deep("llama"), resident_layers="auto", account=device)
    weights = engine._weights.streamed
    assert weights is not None
    before, whole = engine.status(), device.taken_bytes
    cell = weights.bytes_of(LAYERS) - weights.bytes_of(LAYERS - 1)
    engine.balloon(before.spare_bytes)
    assert engine.status().resident_layers == LAYERS, "KV goes first"
    done = engine.balloon(before.spare_bytes + 3 * cell)
    status = engine.status()
    assert status.weights_bytes == weights.bytes_of(3) == before.weights_bytes - 3 * cell
    assert done.ballooned_bytes == status.ballooned_bytes == before.spare_bytes + 3 * cell
    assert device.taken_bytes == whole - done.ballooned_bytes == status.weights_bytes + status.kv_bytes
    assert status.spare_bytes == 0
    for wrong in (-1, 1 << 40):
        with pytest.raises(TransitionError, match="its KV pool and its weights can give up"):
            engine.balloon(wrong)
    engine.demote()
    assert device.taken_bytes == 0
    engine.promote(None)
    assert engine.status().ballooned_bytes == done.ballooned_bytes
    assert device.taken_bytes == whole - done.ballooned_bytes
    with pytest.raises(TransitionError, match="its weights are in use"):
        engine.balloon(before.spare_bytes + 4 * cell, gently=True)
    for room in (cell, before.spare_bytes + cell):
        device.total_bytes = device.taken_bytes + room
        with pytest.raises(DeviceOutOfMemory):
            engine.balloon(0)
        assert engine.status().ballooned_bytes == done.ballooned_bytes
        assert device.taken_bytes == whole - done.ballooned_bytes
    device.total_bytes = 1 << 40
    engine.balloon(0)
    assert device.taken_bytes == whole


def test_what_layers_could_be_given_is_told_with_what_that_costs_once_it_was_measured(
    deep: ModelDir, engine_for: EngineFor
) -> None:
    engine = engine_for(deep("llama"), resident_layers="auto")
    layers = engine._weights.streamed
    assert isinstance(layers, LayeredWeights)
    assert (engine.status().layer_bytes, engine.status().layer_s) == (0, 0.0), "no request has ended yet"
    cut = Run(engine, "cut", MIXED[0], max_tokens=200)
    assert cut.first.wait(60)
    engine.abort("cut")
    assert cut.wait().reason == "abort"
    Run(engine, "canary", MIXED[0], max_tokens=1, probe=True).wait()
    assert engine.status().layer_bytes == 0, "neither tells how long requests are"
    Run(engine, "a", MIXED[0], max_tokens=20).wait()
    status = engine.status()
    assert status.layer_bytes == layers.bytes_of(LAYERS) - layers.bytes_of(2)
    assert layers.load_rate is not None
    # Never streamed: at the rate of the load, all six for twenty tokens.
    assert status.layer_s == pytest.approx(20 * LAYERS * layers._cells.cell_bytes / layers.load_rate)
    engine.balloon(status.spare_bytes + layers.bytes_of(LAYERS) - layers.bytes_of(4))
    Run(engine, "b", MIXED[0], max_tokens=20).wait()
    less = engine.status()
    assert less.layer_bytes == layers.bytes_of(4) - layers.bytes_of(2)
    assert layers._layer_stream.rates is not None, "measured by now"
    engine.balloon(status.spare_bytes + layers.bytes_of(LAYERS) - layers.bytes_of(2))
    assert (engine.status().layer_bytes, engine.status().layer_s) == (0, 0.0)
    engine.demote()
    assert engine.status().layer_bytes == 0


@pytest.fixture
def image_of(deep: ModelDir) -> Iterator[Callable[[GenerateEngine], int]]:
    opened: list[int] = []

    def fill(engine: GenerateEngine) -> int:
        opened.append(image.create("layers", engine.image_bytes))
        engine.fill_image(opened[-1])
        image.seal(opened[-1])
        return opened[-1]

    yield fill
    for fd in opened:
        os.close(fd)


def test_swaps_and_an_image_that_comes_and_goes_while_a_sequence_runs(
    deep: ModelDir, engine_for: EngineFor, image_of: Callable[[GenerateEngine], int]
) -> None:
    path = deep("qwen3_moe")
    expected = answers(engine_for(path))
    engine = engine_for(path, resident_layers=1, promote=False, enable_prefix_caching=False)
    fd = image_of(engine)
    engine.use_image(None)
    for source in (None, fd, None):
        engine.promote(source)
        assert answers(engine) == expected
        engine.demote()
    engine.promote(fd)
    plain = Run(engine, "plain", MIXED[1], max_tokens=120, logprobs=2).wait()
    run = Run(engine, "on", MIXED[1], max_tokens=120, logprobs=2)
    sources = cycle([None, fd])
    while not run.done.is_set():
        engine.use_image(next(sources))
        run.done.wait(0.01)
    assert [o.logprob for o in run.outputs] == [o.logprob for o in plain.outputs]
    # From now on nothing reads the image: the shards may not be missed either.
    engine.use_image(fd)
    answers(engine)


def test_a_shard_that_cannot_be_read_ends_the_step_and_the_engine_lives(
    deep: ModelDir, engine_for: EngineFor, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    subprocess.run(["cp", "-r", str(deep("llama")), str(path)], check=True)
    engine = engine_for(path, resident_layers=0)
    expected = answers(engine)
    shards = {shard: shard.read_bytes() for shard in path.glob("*.safetensors")}
    for shard, content in shards.items():
        os.truncate(shard, len(content) // 2)
    run = Run(engine, "failing", MIXED[0], max_tokens=50).wait()
    assert run.reason == "error"
    assert "shrank" in (run.error or "")
    assert "tensor 'model.layers." in (engine.status().error or "")
    assert Run(engine, "again", MIXED[0]).wait().reason == "error"
    for shard, content in shards.items():
        shard.write_bytes(content)
    assert answers(engine) == expected
    assert engine.status().error is None
    assert engine.status().kv_blocks_free == engine.status().kv_blocks_total


def test_close_ends_a_step_that_waits_for_its_disk(deep: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(deep("llama"), resident_layers=0)
    weights = engine._weights.streamed
    assert weights is not None
    copier = weights._stream._copier
    assert copier is not None
    readers = copier._readers  # type: ignore[attr-defined]
    for _ in range(4):
        # The threads are as busy as with a disk that hangs.
        readers._pool.submit(readers._cancel.wait, 100)
    run = Run(engine, "waits", MIXED[0], max_tokens=200)
    threading.Timer(0.5, engine.close).start()
    began = time.monotonic()
    assert run.wait().reason in ("error", "abort")
    engine.close()
    assert time.monotonic() - began < 60


def test_what_is_promised_beforehand_is_what_is_taken(deep: ModelDir, engine_for: EngineFor) -> None:
    for name in DEEP:
        for wish in (0, 2, "auto"):
            engine = engine_for(deep(name), resident_layers=wish, promote=False, device_memory_bytes=None)
            promoted = engine.promote(None)
            spec = WorkerSpec("tiny", str(deep(name)), block_size=4, threads=1, resident_layers=wish)
            told, guessed = footprint(spec), estimate(spec)
            assert guessed is not None
            assert told.kv_bytes == promoted.kv_bytes == guessed.kv_bytes
            assert told.weights_bytes == guessed.weights_bytes
            assert promoted.weights_bytes <= told.weights_bytes < 1.02 * promoted.weights_bytes + 8192


def test_auto_leaves_no_more_than_fits(deep: ModelDir, engine_for: EngineFor) -> None:
    spec = WorkerSpec("tiny", str(deep("llama")), block_size=4, threads=1, resident_layers="auto", max_num_seqs=2)
    whole = footprint(spec)
    limit = 64 * MiB + whole.kv_bytes + whole.weights_bytes * 2 // 3
    engine = engine_for(deep("llama"), resident_layers="auto", device_memory_bytes=limit, max_num_seqs=2)
    status = engine.status()
    assert 0 <= status.resident_layers < LAYERS
    assert status.weights_bytes * 9 // 8 + status.kv_bytes + 64 * MiB <= limit


def test_a_model_that_embeds_is_not_streamed(minilm: Path) -> None:
    with pytest.raises(ConfigError, match="resident_layers"):
        open_engine(WorkerSpec("mini", str(minilm), task="embed", resident_layers=2), OpenAccount())


@pytest.mark.parametrize(
    ("nbytes", "kv_bytes", "cells"),
    [(0, 0, 8), (50, 50, 8), (51, 41, 7), (60, 50, 7), (61, 51 - 10, 6), (110, 50, 2), (130, 70, 2), (-1, 0, 8)],
)
def test_kv_that_nobody_misses_goes_first_then_layers_then_the_rest(nbytes: int, kv_bytes: int, cells: int) -> None:
    give = share(nbytes, easy_bytes=50, most_cells=8, least_cells=2, cell_bytes=lambda count: 100 + 10 * count)
    assert (give.kv_bytes, give.cells) == (kv_bytes, cells)


_IN_LITTLE_MEMORY = """
import json, os, sys, threading
from pathlib import Path
from mball.device.account import OpenAccount
from mball.memory.spec import WorkerSpec
from mball.server.engine import open_engine
from tests.server.engine.driving import Run

def anonymous():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

wish = json.loads(sys.argv[2])
engine = open_engine(WorkerSpec("m", sys.argv[1], threads=1, resident_layers=wish, max_num_seqs=1, max_model_len=64),
                     OpenAccount())
before = anonymous()
engine.promote(None)
seen = []
engine._weights.module.lm_head.register_forward_hook(lambda *_: seen.append(anonymous()))
run = Run(engine, "r", [5, 6, 7], max_tokens=4, logprobs=2).wait()
print(json.dumps({"peak": max(seen) - before, "logprobs": [[o.token_id, o.logprob.logprob] for o in run.outputs]}))
sys.stdout.flush()
engine.close()
"""


def test_a_model_runs_in_a_fraction_of_its_size(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256, hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    nbytes = Checkpoint.open(tmp_path).nbytes
    shard = tmp_path / "model.safetensors"
    forgotten = _forget(shard)
    results = {}
    for wish in (0, None):
        done = subprocess.run(
            [sys.executable, "-c", _IN_LITTLE_MEMORY, str(tmp_path), json.dumps(wish)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        results[wish] = json.loads(done.stdout.splitlines()[-1])
        if wish == 0:
            cached = _cached_bytes(shard)
    assert results[0]["logprobs"] == results[None]["logprobs"]
    assert results[None]["peak"] > 0.9 * nbytes
    # Two slots of ten layers, the buffers that the threads read through, and what computing takes.
    assert results[0]["peak"] < 0.4 * nbytes, (results[0]["peak"] / MiB, nbytes / MiB)
    # What the kernel reads ahead of the resident part stays, some tens of MiB here.
    assert not forgotten or cached < 0.3 * nbytes, "the page cache was filled with what passed through"


def _forget(file: Path) -> bool:
    """Out of the page cache; False where the kernel keeps pages for reasons of its own."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return _cached_bytes(file) == 0


def _cached_bytes(file: Path) -> float:
    fd = os.open(file, os.O_RDONLY)
    try:
        share = resident_share(fd, 0, file.stat().st_size)
    finally:
        os.close(fd)
    return (share or 0.0) * file.stat().st_size
