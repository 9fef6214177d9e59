"""One way to run a model of which a part is not on the device, in a process of its own:
`python -m mball.bench.layers_contenders SPEC`; it speaks as mball.bench.contenders does."""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mball.bench import pagecache, raw_disk
from mball.bench.contenders import Cannot, in_turn

MBALL = "mball"
ACCELERATE = "accelerate device_map"
VLLM = "vLLM prefetch offload"

_PROMPT = tuple(range(5, 37))
_WARM_STEPS = 12
"""Left out: among them the number of slots is chosen from measurements."""

_LEAST_STEPS = 3
_RAW_S = 1.0
_RAW_PASSES = 3
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Spec:
    """`streamed_share` of the layers are not on the device, for MBALL; for others `vram_bytes` are what MBALL's weights
    take then. `image_fd`: the source image, inherited; None: from the shards, out of the page cache. A measurement ends
    after `steps` tokens or `limit_s`."""

    contender: str
    path: str
    device: str
    streamed_share: float
    steps: int
    limit_s: float
    image_fd: int | None = None
    vram_bytes: int = 0

    def command(self) -> list[str]:
        return [sys.executable, "-m", "mball.bench.layers_contenders", json.dumps(asdict(self))]


def mball(spec: Spec) -> dict[str, Any]:
    """All layers resident, then as many as wanted streamed, in one engine: step times, the logprobs of both, and what
    the way from the image or the disk gives with nothing else to do."""
    from mball.device.account import OpenAccount
    from mball.memory.spec import WorkerSpec
    from mball.server.engine import open_engine
    from mball.server.engine.engine import GenerateEngine
    from mball.swap.layers import LayeredWeights

    threads = 2 if spec.device == "cpu" else 1
    worker = WorkerSpec(
        "bench",
        spec.path,
        device=spec.device,
        threads=threads,
        max_num_seqs=1,
        max_model_len=len(_PROMPT) + spec.steps + _WARM_STEPS,
        resident_layers="auto",
        # The same prompt is computed again and again.
        enable_prefix_caching=False,
    )
    engine = open_engine(worker, OpenAccount())
    layers = engine._weights.streamed
    if not isinstance(engine, GenerateEngine) or not isinstance(layers, LayeredWeights):
        raise Cannot("the model has no layers to stream")
    num_layers = layers.layout.num_layers
    try:
        engine.promote(spec.image_fd)
        whole = _steps(engine, spec)
        cells = max(layers.least_cells, num_layers - round(spec.streamed_share * num_layers) + 2)
        _take(engine, layers, cells)
        if spec.image_fd is None:
            _forget(spec)
        raw = _raw_rate(engine, spec)
        disk = [] if spec.image_fd is not None else [_disk(layers, spec)]
        part = _steps(engine, spec)
        layout = layers.layout
        if disk:
            disk.append(_disk(layers, spec))
        streamed_bytes = sum(layers._parts[layer].nbytes for layer in layout.streamed)
        same = min(len(whole.logprobs), len(part.logprobs))
        if whole.logprobs[:same] != part.logprobs[:same]:
            raise Cannot("its logprobs differ from those with all layers resident")
        bound_s = max(whole.step_s, streamed_bytes / raw)
        return {
            "resident_step_s": whole.step_s,
            "step_s": part.step_s,
            "bound_s": bound_s,
            "tokens_s": 1 / part.step_s,
            "raw_bytes_s": raw,
            "streamed_bytes": streamed_bytes,
            "streamed_bytes_s": streamed_bytes / part.step_s,
            "weights_bytes": layers.nbytes,
            "device_bytes": _device_bytes(spec),
            "steps": len(part.gaps),
            **({"disk_bytes_s": raw_disk.best(disk)[1]} if disk else {}),
            "facts": {
                **({"disk_depth": raw_disk.best(disk)[0]} if disk else {}),
                "streamed": f"{len(layout.streamed)} of {num_layers} layers",
                "slots": layout.slots,
                "compared_tokens": same,
                "image": "registered" if getattr(layers._layer_stream._copier, "_image", None) else "read by threads",
            },
        }
    finally:
        engine.close()


def accelerate(spec: Spec) -> dict[str, Any]:
    """transformers' `generate` on a model that accelerate has put on the GPU as far as `vram_bytes` go, the rest in
    host memory: a layer is copied when its turn comes."""
    if spec.device == "cpu":
        raise Cannot("it is measured on GPUs alone")
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model: Any = AutoModelForCausalLM.from_pretrained(
        spec.path, dtype="auto", device_map="auto", max_memory={0: spec.vram_bytes, "cpu": 1 << 40}
    )
    on_host = sum(1 for place in model.hf_device_map.values() if place == "cpu")
    times: list[float] = []

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    class Late:
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            late = len(times) > _LEAST_STEPS + 2 and times[-1] - times[1] > spec.limit_s
            return torch.full((input_ids.shape[0],), late, dtype=torch.bool, device=input_ids.device)

    prompt = torch.tensor([_PROMPT], device=spec.device)
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=spec.steps,
            min_new_tokens=spec.steps,
            do_sample=False,
            streamer=Clock(),
            stopping_criteria=[Late()],
        )
    # The first is the prompt itself, the second the prefill's token.
    gaps = [later - earlier for earlier, later in pairwise(times[1:])][1:]
    if not gaps:
        raise Cannot("it gave too few tokens")
    step_s = statistics.median(gaps)
    return {
        "step_s": step_s,
        "tokens_s": 1 / step_s,
        "weights_bytes": spec.vram_bytes,
        "device_bytes": _device_bytes(spec),
        "steps": len(gaps),
        "facts": {"streamed": f"{on_host} of {len(model.hf_device_map)} parts"},
    }


CONTENDERS = {MBALL: mball, ACCELERATE: accelerate}


@dataclass(frozen=True, slots=True)
class _Seen:
    gaps: list[float]
    logprobs: list[tuple[int, float]]

    @property
    def step_s(self) -> float:
        return statistics.median(self.gaps)


def _steps(engine: Any, spec: Spec) -> _Seen:
    """The time between two tokens of one sequence."""
    from mball.server.engine.api import GenerateRequest, Output, SamplingParams

    times: list[float] = []
    outputs: list[Output] = []
    done, late = threading.Event(), threading.Event()

    def emit(output: Output) -> None:
        times.append(time.perf_counter())
        outputs.append(output)
        if output.finish_reason is not None:
            done.set()
        elif len(times) >= _LEAST_STEPS + 1 and times[-1] - times[0] > spec.limit_s:
            late.set()
            engine.abort("bench")

    count = spec.steps + _WARM_STEPS
    params = SamplingParams(max_tokens=count, seed=0, temperature=0.0, logprobs=0, min_tokens=count)
    engine.submit(GenerateRequest("bench", _PROMPT, params), emit)
    if not done.wait(_TIMEOUT_S + 2 * spec.limit_s):
        raise Cannot("a sequence did not end")
    if outputs[-1].error is not None:
        raise Cannot(outputs[-1].error)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if late.is_set():
        # The last one is the end that was asked for.
        gaps = gaps[:-1]
    gaps = gaps[_WARM_STEPS:] if len(gaps) > _WARM_STEPS + _LEAST_STEPS else gaps[1:] or gaps
    if not gaps:
        raise Cannot("it gave too few tokens")
    found = [(o.token_id, o.logprob.logprob) for o in outputs if o.token_id is not None and o.logprob is not None]
    return _Seen(gaps, found)


def _take(engine: Any, layers: Any, cells: int) -> None:
    """By the balloon, while the engine is there: the KV pool's spare goes first."""
    spare = engine.status().spare_bytes
    engine.balloon(spare + layers.bytes_of(layers.max_cells) - layers.bytes_of(cells))
    if layers.cells != cells:
        raise Cannot(f"{layers.cells} cells are left, not {cells}")


def _raw_rate(engine: Any, spec: Spec) -> float:
    """Bytes a second of the streamed layers' copies or reads with nothing else to do, one behind the other."""
    rates: list[float] = []

    def measure() -> None:
        stream = engine._weights.streamed._layer_stream
        stream._settle()
        copier, cells = stream._copier, stream._cells
        for _ in range(_RAW_PASSES):
            if spec.image_fd is None:
                _forget(spec)
            began, nbytes = time.perf_counter(), 0
            fetches = []
            for number, layer in enumerate(stream.layout.streamed):
                cell = stream._slots[number % len(stream._slots)]
                fetches.append(copier.fetch(stream._layers[layer], cells.cell(cell), None))
                nbytes += stream._layers[layer].nbytes
                if len(fetches) >= 2:
                    _settled(fetches.pop(0))
                if time.perf_counter() - began > spec.limit_s:
                    break
            for fetch in fetches:
                _settled(fetch)
            rates.append(nbytes / (time.perf_counter() - began))
        copier.reset()
        stream._restart()

    engine._between_steps(measure)
    return max(rates)


def _disk(layers: Any, spec: Spec) -> raw_disk.Rates:
    """The bare disk, of the bytes of the streamed layers."""
    _forget(spec)
    shards = layers._checkpoint.shards
    stretches = [
        raw_disk.Stretch(str(shards[extent.shard].path), extent.start, extent.nbytes)
        for layer in layers.layout.streamed
        for extent in layers._parts[layer].extents
    ]
    found = raw_disk.rates(stretches, spec.limit_s / len(raw_disk.DEPTHS))
    _forget(spec)
    return found


def _settled(fetch: Any) -> None:
    fetch.arrive()
    if not fetch.settle():
        raise Cannot("a read hangs")


def _forget(spec: Spec) -> None:
    pagecache.drop(sorted(Path(spec.path).glob("*.safetensors")))


def _device_bytes(spec: Spec) -> int:
    """On a GPU what this process and its context have of it, as the driver says."""
    if spec.device == "cpu":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return total_bytes - free_bytes


def main(argument: str) -> dict[str, Any]:
    spec = Spec(**json.loads(argument))
    try:
        import accelerate as _accelerate  # type: ignore[import-untyped]
        import transformers

        if spec.device != "cpu" and not torch.cuda.is_available():
            return {"cannot": f"torch {torch.__version__} finds no GPU here"}
        versions: Sequence[str] = (_accelerate.__version__, transformers.__version__)
    except ImportError as error:
        return {"cannot": f"not installed ({error})"}
    result = in_turn(lambda _: CONTENDERS[spec.contender](spec))
    if spec.contender == ACCELERATE and "facts" in result:
        result["facts"]["version"] = versions[0]
    return result


if __name__ == "__main__":
    # This file as a module, too: its exceptions must be those that the other modules raise.
    from mball.bench import layers_contenders

    sys.stdout.write(json.dumps(layers_contenders.main(sys.argv[1])) + "\n")
    sys.stdout.flush()
    # There is nothing to be kept, and taking a large process apart in good order takes long.
    os._exit(0)
