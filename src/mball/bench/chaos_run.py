"""`mball bench chaos`: a run with real workers, its models made for it where none are named."""

from __future__ import annotations

import asyncio
import logging
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog
from rich.console import Console
from rich.table import Table

from mball.bench import chaos_report as report
from mball.bench.chaos import Plan, Result, run
from mball.memory.spec import ModelSpec, WorkerSpec
from mball.server.models import random as random_models
from mball.units import MiB

_MODELS = 3
_MODEL_BYTES = 16 * MiB
_KV_BYTES = 8 * MiB
_ROOM = 1.7
"""Of the largest model: any one has room, no two."""
_LIAR = "liar"


def run_chaos(
    models: Sequence[Path],
    *,
    requests: int,
    swaps: int,
    clients: int,
    kill_s: float,
    seed: int,
    json_path: Path | None,
    markdown_path: Path | None,
    console: Console,
) -> bool:
    """Whether every promise held."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    command = shlex.join(["mball", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="mball-models-") as folder:
        paths = list(models) or _make(Path(folder), seed)
        plan = _plan(paths, requests=requests, swaps=swaps, clients=clients, kill_s=kill_s, seed=seed)
        with console.status("asking each model alone") as status:

            def told(result: Result) -> None:
                faults = sum(result.faults.values())
                status.update(f"{result.requests} requests, {result.swaps} swaps, {faults} killed")

            result = asyncio.run(run(plan, told))
    found = report.checks(result, requests=requests, swaps=swaps)
    table = Table("", "measured", "promised", "")
    for check in found:
        table.add_row(check.name, check.measured, check.promised, "holds" if check.holds else "[bold]does not[/]")
    console.print(table)
    if json_path is not None:
        report.write(json_path, report.to_json(result, found, command))
    if markdown_path is not None:
        report.write(markdown_path, report.to_markdown(result, found, command))
    return all(check.holds for check in found)


def _make(folder: Path, seed: int) -> list[Path]:
    paths = [folder / f"chaos-{number}" for number in range(_MODELS)]
    for number, path in enumerate(paths):
        # In float32 no rounding depends on which requests share a batch.
        random_models.make("llama", path, size_bytes=_MODEL_BYTES, seed=seed + number, dtype="float32")
    return paths


def _plan(paths: Sequence[Path], *, requests: int, swaps: int, clients: int, kill_s: float, seed: int) -> Plan:
    def spec(name: str, path: Path) -> ModelSpec:
        worker = WorkerSpec(
            model=name,
            path=str(path),
            dtype="float32",
            max_model_len=256,
            max_num_seqs=4,
            kv_cache_bytes=_KV_BYTES,
            threads=1,
        )
        return ModelSpec(worker, working_bytes=0)

    largest = max(sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in paths)
    return Plan(
        [*(spec(path.name, path) for path in paths), spec(_LIAR, paths[0])],
        command_for=_command,
        zygote_for=_zygote,
        device_bytes=round(_ROOM * (largest + _KV_BYTES)) + 8 * MiB,
        requests=requests,
        swaps=swaps,
        clients=clients,
        kill_s=kill_s,
        seed=seed,
        liar=_LIAR,
    )


def _command(model: ModelSpec) -> list[str]:
    worker = ["mball.bench.chaos_liar", "worker"] if model.name == _LIAR else ["mball.server.worker"]
    return [sys.executable, "-m", *worker]


def _zygote(model: ModelSpec) -> list[str]:
    zygote = ["mball.bench.chaos_liar", "zygote"] if model.name == _LIAR else ["mball.server.worker.zygote"]
    return [sys.executable, "-m", *zygote]
