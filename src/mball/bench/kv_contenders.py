"""A prefix's KV brought back from one place, in a process of its own: `python -m mball.bench.kv_contenders SPEC`; it
speaks as mball.bench.contenders does."""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mball.bench.contenders import Cannot, in_turn
from mball.swap.kv_local import LocalBlocks
from mball.swap.layout import BLOCK_BYTES, whole_blocks
from mball.swap.place import Place, Run
from mball.swap.slots import Slots
from mball.swap.store import Settings, SwapStore, open_store
from mball.units import MiB

DRAM = "DRAM"
STORE = "store"

SHARES = (1, 2, 4, 8, 16)
"""Of the tokens, so many-th each: prefixes for the gate to decide about."""
MODES: dict[str, bool | None] = {"computed": False, "restored": True, "gate": None}
CLEARLY = 1.10
"""A decision is wrong where the other way is so many times as fast, and faster each time."""
_TIMEOUT_S = 300.0
_SEED = 11


@dataclass(frozen=True, slots=True)
class Spec:
    """`tokens` of a prompt come back from `source`: the arena, or a store in `folder` that reads `disk_rate` bytes a
    second at most (None: as fast as it can). Each is measured `repeats` times."""

    source: str
    path: str
    device: str
    tokens: int
    repeats: int
    folder: str | None = None
    disk_rate: float | None = None

    def command(self) -> list[str]:
        return [sys.executable, "-m", "mball.bench.kv_contenders", json.dumps(asdict(self))]


class Bench:
    """An engine, and what is done to it between two measurements."""

    def __init__(self, spec: Spec) -> None:
        from mball.device.account import OpenAccount
        from mball.loader.checkpoint import Checkpoint
        from mball.memory.spec import WorkerSpec
        from mball.server.engine import open_engine
        from mball.server.engine import transformers_adapter as adapter
        from mball.server.engine.engine import GenerateEngine

        worker = WorkerSpec(
            "bench",
            spec.path,
            device=spec.device,
            threads=2 if spec.device == "cpu" else 1,
            max_num_seqs=1,
            max_model_len=spec.tokens + 16,
        )
        config = adapter.read_config(worker)
        geometry = adapter.kv_geometry(
            worker, config, adapter.choose_dtype(worker, config, Checkpoint.open(worker.path))
        )
        self.block_bytes = geometry.block_bytes(worker.block_size)
        self.blocks = spec.tokens // worker.block_size + 2
        arena_bytes = (self.blocks + 16) * whole_blocks(self.block_bytes)
        engine = open_engine(_with_arena(worker, arena_bytes), OpenAccount())
        if not isinstance(engine, GenerateEngine) or engine._tier is None:
            raise Cannot("the model has no KV to bring back")
        self.engine, self.tier, self.spec = engine, engine._tier, spec
        self.store: SwapStore | None = None
        if self.tier._preparing is not None:
            self.tier._preparing.join(_TIMEOUT_S)
        engine.promote(None)
        prompt_of = range(3, engine.vocab_size)
        self.prompt = [prompt_of[(_SEED + 7919 * n) % len(prompt_of)] for n in range(spec.tokens)]

    def ask(self, tokens: int) -> tuple[float, Any]:
        """Seconds to the first token of the prompt's first `tokens`, and that token with its log probability."""
        from mball.server.engine.api import GenerateRequest, Output, SamplingParams

        found: list[tuple[float, Output]] = []
        done = threading.Event()

        def emit(output: Output) -> None:
            found.append((time.perf_counter(), output))
            if output.finish_reason is not None:
                done.set()

        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=0)
        began = time.perf_counter()
        self.engine.submit(GenerateRequest("bench", self.prompt[:tokens], params), emit)
        if not done.wait(_TIMEOUT_S):
            raise Cannot("a sequence did not end")
        at, output = found[0]
        if output.error is not None or output.logprob is None:
            raise Cannot(output.error or "no token came")
        return at - began, (output.token_id, output.logprob.logprob)

    def prepare(self) -> Any:
        """The prompt's KV is where it is to come back from; returns what is answered with it in the pool."""
        if self.spec.source == STORE:
            slot_bytes = whole_blocks(self.block_bytes)
            each = slot_bytes + BLOCK_BYTES + 1024
            settings = Settings(
                Path(self.spec.folder or "."),
                size_bytes=(self.blocks + 8) * each + 8 * MiB,
                slot_bytes=slot_bytes,
                ephemeral=True,
            )
            self.store = open_store(settings)
            self.engine.use_block_store(Throttled(self.store, self.spec.disk_rate))
        self.ask(self.spec.tokens)
        _, wanted = self.ask(self.spec.tokens)
        self.away(keep=True)
        self._written()
        return wanted

    def away(self, *, keep: bool = False) -> None:
        """Nothing is in the pool, and where it is to come from the store, nothing in the arena."""
        forced, self.tier.gate.forced = self.tier.gate.forced, True
        allocator, arena = self.engine._scheduler.allocator, self.tier._room.arena

        def evict() -> None:
            allocator.evict(allocator.max_blocks)
            if self.tier._copies is not None:
                self.tier._copies.drain()

        self.engine._between_steps(evict)
        self.tier.gate.forced = forced
        if self.spec.source == STORE and not keep:
            self._written()
            with self.tier._room.lock:
                for held in sorted(arena.shelf, key=lambda held: -held.depth):
                    arena.drop(held)

    def restored_tokens(self) -> int:
        return self.engine.status().kv_restored_tokens

    def close(self) -> None:
        self.engine.close()
        if self.store is not None:
            self.store.close()

    def _written(self) -> None:
        for lane in (self.tier._disk._writes, self.tier._disk._reads):
            if lane is not None and not lane.idle(_TIMEOUT_S):
                raise Cannot("the store does not end writing")


class Throttled(LocalBlocks):
    """A store whose disk reads at a rate of `disk_rate` at most."""

    def __init__(self, store: SwapStore, disk_rate: float | None) -> None:
        super().__init__(store, "bench")
        slots = store.slots
        self._throttled = slots if disk_rate is None else SlowSlots(slots, disk_rate)

    @property
    def slots(self) -> Slots:
        return self._throttled


class SlowSlots(Slots):
    """All threads together read no faster than `rate` bytes a second."""

    def __init__(self, slots: Slots, rate: float) -> None:
        super().__init__(slots.disk, slots.layout, slots.store_id)
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._never = threading.Event()

    def read_run(self, place: Place, run: Run, into: memoryview, offset: int = 0) -> int:
        with self._lock:
            begin = max(self._free_at, time.perf_counter())
            self._free_at = begin + run.slots * self.layout.stride_bytes / self._rate
            ends = self._free_at
        done = super().read_run(place, run, into, offset)
        if (left := ends - time.perf_counter()) > 0:
            self._never.wait(left)
        return done


def measure(spec: Spec) -> dict[str, Any]:
    """Medians over the repeats, of the whole prompt by name; and how often the gate was wrong, over all lengths."""
    bench = Bench(spec)
    try:
        wanted = bench.prepare()
        lengths = [spec.tokens // share for share in SHARES if spec.tokens // share > 16]
        times: dict[tuple[int, str], list[float]] = {}
        admitted: dict[int, list[bool]] = {}
        for repeat in range(-1, spec.repeats):
            for length in lengths:
                for mode in _turned(list(MODES), repeat):
                    seconds, brought, said = _one(bench, length, mode)
                    if mode == "restored" and length == spec.tokens and said != wanted:
                        raise Cannot(f"{said} with the KV brought back, {wanted} with it in the pool")
                    if mode == "restored" and not brought:
                        raise Cannot(f"no KV of {length} tokens came back")
                    # The first round teaches the gate.
                    if repeat >= 0:
                        times.setdefault((length, mode), []).append(seconds)
                        if mode == "gate":
                            admitted.setdefault(length, []).append(brought)
        return _result(bench, lengths, times, admitted)
    finally:
        bench.close()


def _one(bench: Bench, length: int, mode: str) -> tuple[float, bool, Any]:
    bench.tier.gate.forced = None
    bench.away()
    bench.tier.gate.forced = MODES[mode]
    before = bench.restored_tokens()
    seconds, said = bench.ask(length)
    return seconds, bench.restored_tokens() > before, said


def _result(
    bench: Bench,
    lengths: Sequence[int],
    times: dict[tuple[int, str], list[float]],
    admitted: dict[int, list[bool]],
) -> dict[str, Any]:
    spec, longest = bench.spec, lengths[0]
    median = {which: statistics.median(found) for which, found in times.items()}
    wrong = 0
    for length in lengths:
        computed, restored = median[length, "computed"], median[length, "restored"]
        apart = _apart(times[length, "computed"], times[length, "restored"])
        for yes in admitted[length]:
            taken, other = (restored, computed) if yes else (computed, restored)
            wrong += apart and taken > CLEARLY * other
    kv_bytes = (longest - 1) // 16 * bench.block_bytes
    said = {
        str(length): {
            "computed_ms": round(median[length, "computed"] * 1e3, 1),
            "restored_ms": round(median[length, "restored"] * 1e3, 1),
            "gate_ms": round(median[length, "gate"] * 1e3, 1),
            "admitted": f"{sum(admitted[length])} of {len(admitted[length])}",
        }
        for length in lengths
    }
    return {
        **{f"{mode}_s": median[longest, mode] for mode in MODES},
        "admitted": statistics.mean(admitted[longest]),
        "decisions": sum(map(len, admitted.values())),
        "wrong": wrong,
        "kv_bytes": kv_bytes,
        "facts": {"by tokens": said, "gate": bench.tier.counts(), "disk rate": spec.disk_rate or ""},
    }


def _apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the difference is more than noise: none of the one is among the other."""
    return max(one) < min(other) or max(other) < min(one)


def _turned(modes: list[str], turn: int) -> list[str]:
    start = turn % len(modes)
    return [*modes[start:], *modes[:start]]


def _with_arena(worker: Any, arena_bytes: int) -> Any:
    import dataclasses

    return dataclasses.replace(worker, kv_arena_bytes=arena_bytes)


def main(argument: str) -> dict[str, Any]:
    spec = Spec(**json.loads(argument))
    try:
        import torch
        import transformers as _transformers  # noqa: F401

        if spec.device != "cpu" and not torch.cuda.is_available():
            return {"cannot": f"torch {torch.__version__} finds no GPU here"}
    except ImportError as error:
        return {"cannot": f"not installed ({error})"}
    return in_turn(lambda _: measure(spec))


if __name__ == "__main__":
    # This file as a module, too: its exceptions must be those that the other modules raise.
    from mball.bench import kv_contenders

    sys.stdout.write(json.dumps(kv_contenders.main(sys.argv[1])) + "\n")
    sys.stdout.flush()
    os._exit(0)
