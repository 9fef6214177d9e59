"""`mball bench layers`: a model with a part of its layers streamed, against what computing and the bus allow, and
against accelerate's offload with the same memory."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from mball.bench import contenders, layers_vllm, machine, pagecache
from mball.bench.baselines import BUS
from mball.bench.layers_contenders import ACCELERATE, MBALL, VLLM, Spec
from mball.bench.report import Column, Kept, Report, Spread
from mball.bench.runner import Contender, Outcome, run
from mball.errors import ConfigError
from mball.loader import Checkpoint, image
from mball.memory.spec import WorkerSpec
from mball.server.engine.transformers_adapter import read_config, text_config
from mball.swap.layers_plan import LEAST_SLOTS, Sizes, sizes_of
from mball.units import GiB, format_bytes

SOURCES = ("image", "disk")
PEERS = {"accelerate": ACCELERATE}
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_PACKAGES = ("torch", "transformers", "accelerate", "cuda-bindings")


@dataclass(frozen=True, slots=True)
class Settings:
    """`share` of the layers are streamed, from the DRAM image or from the disk. A measurement ends after `steps` tokens
    or `limit_s`; a process that takes `timeout_s` for a turn is given up. `vllm`: a Python that has vLLM."""

    device: str = "cpu"
    share: float = 0.5
    source: str = "image"
    steps: int = 48
    rounds: int = 2
    limit_s: float = 15.0
    timeout_s: float = 300.0
    peers: Sequence[str] = ("accelerate",)
    vllm: Path | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        if self.source not in SOURCES:
            raise ConfigError(f"--source: no {self.source} (there are {', '.join(SOURCES)})")
        if unknown := sorted(set(self.peers) - set(PEERS)):
            raise ConfigError(f"--peers: no {', '.join(unknown)} (there are {', '.join(PEERS)})")
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share: above 0 and at most 1, not {self.share}")

    def command(self, model: Path) -> str:
        words = ["mball", "bench", "layers", str(model), "--device", self.device, "--share", f"{self.share:g}"]
        words += ["--source", self.source, "--steps", str(self.steps), "--rounds", str(self.rounds)]
        words += ["--limit", f"{self.limit_s:g}", "--peers", ",".join(self.peers)]
        return shlex.join([*words, *(["--vllm", self.vllm.name] if self.vllm is not None else [])])


def run_layers(
    model_path: Path,
    settings: Settings,
    *,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    markdown_path: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Measure; print a table, write what is asked for, the JSON after every round.

    Raises ConfigError, CheckpointError; what fails is in the report, with the reason.
    """
    console = console or Console()
    settings.check()
    checkpoint = Checkpoint.open(model_path)
    sizes = _sizes(model_path, checkpoint)
    cells = max(LEAST_SLOTS, sizes.count - round(settings.share * sizes.count) + LEAST_SLOTS)
    report = _report(model_path, checkpoint, settings, sizes)
    kept = Kept(report, json_path, plot_path, markdown_path)
    with (
        _contenders(model_path, checkpoint, settings, sizes.held_bytes(cells)) as contenders,
        console.status("starting") as status,
    ):
        kept.round(
            run(
                contenders,
                reference={},
                rounds=settings.rounds,
                timeout_s=settings.timeout_s,
                progress=status.update,
                after_round=kept.round,
            )
        )
    series = [("a step", lambda o: _of(o, "step_s", 1e3)), ("the bound", lambda o: _of(o, "bound_s", 1e3))]
    kept.end(console, _verdicts(report), COLUMNS, series, "ms")
    return report


def _spread(outcome: Outcome, measure: str, scale: float = 1.0) -> str:
    found = _of(outcome, measure, scale)
    return str(Spread.of(found)) if found else ""


def _of(outcome: Outcome, measure: str, scale: float = 1.0) -> list[float]:
    return [measures[measure] * scale for measures in outcome.rounds if measure in measures]


def _way(outcome: Outcome) -> list[float]:
    """GiB/s with nothing else to do: the hardware's, or MBALL's own."""
    raw = [
        measures["bytes"] / measures.get("steady_s", measures["first_s"])
        for measures in outcome.rounds
        if "bytes" in measures
    ]
    return [rate / GiB for rate in raw] or _of(outcome, "raw_bytes_s", 1 / GiB)


def _ratios(outcome: Outcome) -> list[float]:
    return [measures["step_s"] / measures["bound_s"] for measures in outcome.rounds if measures.get("bound_s")]


COLUMNS = (
    Column("streamed", lambda o: str(o.facts.get("streamed", ""))),
    Column("GiB there", lambda o: _spread(o, "weights_bytes", 1 / GiB)),
    Column("all there, ms", lambda o: _spread(o, "resident_step_s", 1e3)),
    Column("way, GiB/s", lambda o: str(Spread.of(_way(o))) if _way(o) else ""),
    Column("bound, ms", lambda o: _spread(o, "bound_s", 1e3)),
    Column("step, ms", lambda o: _spread(o, "step_s", 1e3)),
    Column("÷ bound", lambda o: str(Spread.of(_ratios(o))) if _ratios(o) else ""),
    Column("tokens/s", lambda o: _spread(o, "tokens_s")),
)


def _verdicts(report: Report) -> list[str]:
    ours, peer = report.outcome(MBALL), report.outcome(ACCELERATE)
    found: list[str] = []
    if ours is not None:
        ratio = Spread.of(_ratios(ours)).median
        found.append(f"A step takes {ratio:.2f} × the longer of computing and the way (wanted: 1.12 at most).")
    hardware = report.outcome(BUS)
    if ours is not None and hardware is not None:
        rate = Spread.of(_of(ours, "streamed_bytes_s", 1 / GiB)).median / Spread.of(_way(hardware)).median
        found.append(f"Layers come at {rate:.2f} of the rate of the {BUS}.")
    if ours is not None and (rates := _of(ours, "disk_bytes_s", 1 / GiB)):
        share = Spread.of([measures["streamed_bytes_s"] / measures["disk_bytes_s"] for measures in ours.rounds]).median
        found.append(
            f"Layers come at {share:.2f} of what O_DIRECT gets from the bare disk at its best depth, in the same "
            f"process: {Spread.of(rates).median:.2f} GiB/s (wanted: 0.90)."
        )
    if ours is not None and peer is not None:
        times = Spread.of(_of(ours, "tokens_s")).median / Spread.of(_of(peer, "tokens_s")).median
        found.append(f"{times:.1f} × the tokens/s of {ACCELERATE} with the same bytes of weights there (wanted: 5).")
    other = report.outcome(VLLM)
    if ours is not None and other is not None:
        times = Spread.of(_of(ours, "tokens_s")).median / Spread.of(_of(other, "tokens_s")).median
        found.append(f"{times:.2f} × the tokens/s of {VLLM}, with {other.facts['streamed']} offloaded.")
    return found


def _report(model_path: Path, checkpoint: Checkpoint, settings: Settings, sizes: Sizes) -> Report:
    way = "its DRAM image" if settings.source == "image" else "the disk"
    return Report(
        benchmark="layers",
        setting={"device": settings.device, "source": settings.source, "share": f"{settings.share:g}"},
        title=f"{format_bytes(checkpoint.nbytes)} with {settings.share:.0%} of its layers streamed from {way}, batch 1",
        command=settings.command(Path(model_path.name)),
        started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe("cuda:0" if settings.device != "cpu" else "cpu"),
        versions=machine.versions(_PACKAGES),
        subject={"layers": sizes.count, "layer bytes": sizes.cell_bytes, "bytes": checkpoint.nbytes},
        outcomes=[],
        notes=[
            "A step: the median time between two tokens of one sequence; all there: the same with every layer on the "
            "device. The way: the streamed layers' copies or reads with nothing else to do, in the same process. The "
            "bound: the longer of a step with all there and the streamed bytes at the way's rate.",
            "Every token's logprob is compared with that of the same engine with all layers there.",
        ],
    )


@contextmanager
def _contenders(
    model_path: Path, checkpoint: Checkpoint, settings: Settings, vram_bytes: int
) -> Iterator[list[Contender]]:
    fds: tuple[int, ...] = ()
    if settings.source == "image":
        fds = (image.create("mball-bench", checkpoint.image_bytes),)
    try:
        if fds:
            image.fill(checkpoint, fds[0])
            image.seal(fds[0])
        device = "cuda:0" if settings.device == "cuda" else settings.device
        shards = [shard.path for shard in checkpoint.shards]

        def contender(name: str, fds: tuple[int, ...]) -> Contender:
            spec = Spec(
                name,
                str(model_path),
                device,
                settings.share,
                settings.steps,
                settings.limit_s,
                image_fd=fds[0] if fds else None,
                vram_bytes=vram_bytes,
            )
            before = (lambda: None) if settings.source == "disk" else (lambda: pagecache.warm(shards))
            return Contender(name, spec.command(), before=before, compared=False, pass_fds=fds)

        bus = contenders.Spec(BUS, str(model_path), device=device)
        yield [
            contender(MBALL, fds),
            *(contender(PEERS[peer], ()) for peer in settings.peers),
            *([] if settings.vllm is None else [_vllm(settings, settings.vllm, model_path, device)]),
            # On the CPU an image is memory already.
            *([Contender(BUS, bus.command(), compared=False)] if fds and device != "cpu" else []),
        ]
    finally:
        for fd in fds:
            os.close(fd)


def _vllm(settings: Settings, python: Path, model_path: Path, device: str) -> Contender:
    spec = Spec(VLLM, str(model_path), device, settings.share, settings.steps, settings.limit_s)
    return Contender(VLLM, [str(python), "-P", layers_vllm.__file__, json.dumps(asdict(spec))], compared=False)


def _sizes(model_path: Path, checkpoint: Checkpoint) -> Sizes:
    text = text_config(read_config(WorkerSpec("bench", str(model_path))))
    stored = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes).dtype
    return sizes_of(checkpoint, int(text.num_hidden_layers), _ITEM_BYTES.get(stored, 4))
