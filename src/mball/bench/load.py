"""`mball bench load`: how fast a model's weights come into memory that the tensors own, on the CPU or a GPU."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from mball.bench import baselines, machine, pagecache
from mball.bench.contenders import PEERS, Spec
from mball.bench.measure import reference_digests
from mball.bench.page import NOTES, columns_of, draw, page
from mball.bench.report import Report, table, to_json
from mball.bench.runner import TIMEOUT_S, Contender, Outcome, run
from mball.errors import ConfigError
from mball.loader import Checkpoint, image
from mball.units import format_bytes

STATES = ("warm", "image", "cold")
_SOURCES = {"warm": "from the page cache", "image": "from its DRAM image", "cold": "from the disk"}
_PACKAGES = (*("torch", "safetensors", "transformers", "fastsafetensors", "runai-model-streamer", "instanttensor"),)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. `limit_s`: a contender whose first call takes longer is called once;
    `timeout_s`: a process that takes so long for a turn is given up. `copies`: the folder for
    the cold state's copies of the model (None: beside the model)."""

    device: str = "cpu"
    states: Sequence[str] = ("warm",)
    peers: Sequence[str] = ("safetensors", "transformers")
    cores: Sequence[int] = ()
    rounds: int = 5
    threads: int | None = None
    limit_s: float | None = None
    timeout_s: float = TIMEOUT_S
    verify: bool = False
    copies: Path | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        for option, given, known in (("--peers", self.peers, PEERS), ("--state", self.states, STATES)):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ConfigError(f"{option}: no {', '.join(unknown)} (there are {', '.join(known)})")
        absent = sorted(set(self.cores) - os.sched_getaffinity(0))
        if absent:
            raise ConfigError(f"--cores: this process may not run on {', '.join(map(str, absent))}")

    def command(self, model: Path) -> str:
        words = ["mball", "bench", "load", str(model)]
        if self.device != "cpu" or tuple(self.states) != ("warm",):
            words += ["--device", self.device, "--state", ",".join(self.states)]
        words += ["--rounds", str(self.rounds), "--peers", ",".join(self.peers)]
        words += ["--cores", ",".join(map(str, self.cores))] if self.cores else []
        words += ["--threads", str(self.threads)] if self.threads is not None else []
        words += ["--limit", f"{self.limit_s:g}"] if self.limit_s is not None else []
        return shlex.join([*words, *(["--verify"] if self.verify else [])])


def run_load(
    model_path: Path,
    settings: Settings,
    *,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    markdown_path: Path | None = None,
    console: Console | None = None,
) -> list[Report]:
    """Time MBALL's loader against its peers on one model, one report a state; print tables, write what is asked for.

    The JSON is written after every round, so that a run that is cut off leaves its rounds. `plot_path` gives the stem
    of SVGs and PNGs. Raises ConfigError for a wrong setting, CheckpointError for a model that can't be opened; a
    contender that fails is in the report, with the reason.
    """
    console = console or Console()
    settings.check()
    checkpoint = Checkpoint.open(model_path)
    pagecache.warm(shard.path for shard in checkpoint.shards)
    reference = reference_digests([shard.path for shard in checkpoint.shards])
    done: list[Report] = []
    with _on_cores(settings.cores), console.status("starting") as status:
        for state in settings.states:
            report = _report(model_path, checkpoint, settings, state)

            def keep(outcomes: list[Outcome], report: Report = report) -> None:
                report.outcomes[:] = outcomes
                if json_path is not None:
                    json_path.write_text(to_json([*done, report]))

            with _contenders(model_path, checkpoint, settings, state) as contenders:
                report.outcomes[:] = run(
                    contenders,
                    reference=reference,
                    rounds=settings.rounds,
                    limit_s=settings.limit_s,
                    timeout_s=settings.timeout_s,
                    progress=status.update,
                    after_round=keep,
                )
            done.append(report)
            console.print(table(report, columns_of(report)))
    if json_path is not None:
        json_path.write_text(to_json(done))
    plots = draw(done, plot_path, console) if plot_path is not None else {}
    if markdown_path is not None:
        markdown_path.write_text(page(done, plots, markdown_path.parent))
    return done


def _report(model_path: Path, checkpoint: Checkpoint, settings: Settings, state: str) -> Report:
    cores = ",".join(map(str, settings.cores))
    where = "CPU" if settings.device == "cpu" else "GPU"
    return Report(
        benchmark="load",
        setting={
            "state": state,
            "device": settings.device,
            "cores": cores,
            "verify": "every byte" if settings.verify else "",
        },
        title=f"Load {format_bytes(checkpoint.nbytes)} {_SOURCES[state]}, {where}"
        + (", in small pages" if state == "image" and not machine.huge_images() else "")
        + (f", on cores {cores} alone" if cores else "")
        + (", every byte verified" if settings.verify else ""),
        command=settings.command(Path(model_path.name)),
        started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe(settings.device),
        versions=machine.versions(_PACKAGES),
        subject={
            "tensors": len(checkpoint.tensors),
            "shards": len(checkpoint.shards),
            "bytes": checkpoint.nbytes,
            "reader threads": settings.threads if settings.threads is not None else "MBALL's choice",
        },
        outcomes=[],
        notes=NOTES[state, where],
    )


@contextmanager
def _contenders(model_path: Path, checkpoint: Checkpoint, settings: Settings, state: str) -> Iterator[list[Contender]]:
    on_gpu = settings.device != "cpu"
    spec = Spec(
        "",
        str(model_path),
        device=settings.device,
        threads=settings.threads,
        cold=state == "cold",
        verify=settings.verify,
        limit_s=settings.limit_s,
    )
    if state == "image":
        fd = image.create("mball-bench", checkpoint.image_bytes)
        try:
            image.fill(checkpoint, fd)
            image.seal(fd)
            ours = [_contender(replace(spec, contender="mball, image", image_fd=fd), fds=(fd,))]
            if on_gpu:
                registering = replace(spec, contender=baselines.REGISTER, image_fd=fd)
                ours += [_contender(registering, fds=(fd,), compared=False), _bus(spec)]
            yield ours
        finally:
            os.close(fd)
    elif state == "cold":
        raw = [baselines.DISK_DIRECT, baselines.DISK_BUFFERED]
        names = [*(name for name in ("mball", "mball, filling its image", *settings.peers)), *raw]
        folder = settings.copies if settings.copies is not None else model_path.absolute().parent
        with tempfile.TemporaryDirectory(prefix="mball-bench-", dir=folder) as copies:
            yield [_cold(replace(spec, contender=name), checkpoint, Path(copies), name not in raw) for name in names]
    else:
        names = ["mball", *settings.peers]
        if on_gpu and "transformers" in settings.peers:
            names.insert(1, "mball, module")
        shards = [shard.path for shard in checkpoint.shards]
        yield [
            *(_contender(replace(spec, contender=name), warm=shards) for name in names),
            *([_bus(spec)] if on_gpu else []),
        ]


def _contender(spec: Spec, *, warm: Sequence[Path] = (), fds: Sequence[int] = (), compared: bool = True) -> Contender:
    return Contender(
        spec.contender, spec.command(), before=lambda: pagecache.warm(warm), compared=compared, pass_fds=fds
    )


def _bus(spec: Spec) -> Contender:
    return _contender(replace(spec, contender=baselines.BUS), compared=False)


def _cold(spec: Spec, checkpoint: Checkpoint, copies: Path, compared: bool) -> Contender:
    """On a copy of its own, so that no contender reads what the host or the disk kept of another's."""
    target = copies / "".join(letter for letter in spec.contender if letter.isalnum())
    if checkpoint.path.is_dir():
        pagecache.copy_model(checkpoint.path, target)
        path = target
    else:
        target.mkdir()
        path = Path(shutil.copyfile(checkpoint.path, target / checkpoint.path.name))
    shards = [path / shard.path.name if path.is_dir() else path for shard in checkpoint.shards]
    return Contender(
        spec.contender,
        replace(spec, path=str(path)).command(),
        before=lambda: pagecache.drop(shards),
        compared=compared,
    )


@contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """This process, and so every one it starts, on these cores alone."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
