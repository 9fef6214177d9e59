"""`python -m mball.server.worker.vllm_process --control-fd N --spec JSON`: one model, served by vLLM's own server.

This process has that server as its child, in its own process group, and speaks for it with the manager. It runs in
vLLM's interpreter and imports nothing that is not in the standard library or in MBALL.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from mball.device import host, prctl
from mball.errors import ConfigError, EngineUnsupported, MballError, TransitionError
from mball.loader import vllm_compat
from mball.loader.checkpoint import Checkpoint
from mball.loader.sampled import sampled
from mball.loader.vllm_names import TRITON_ENVIRONMENT
from mball.memory import control, vllm_options
from mball.memory.estimate import cold_most_bytes, estimate
from mball.memory.spec import WorkerSpec
from mball.memory.vllm_cold import Cold
from mball.server.worker.manners import stopped_by_signals
from mball.server.worker.vllm_door import Door
from mball.server.worker.vllm_forked import Server, Start, fresh
from mball.server.worker.vllm_http import VllmClient
from mball.server.worker.vllm_start import start_stages
from mball.server.worker.vllm_verbs import VllmVerbs, describe, fingerprints, private_bytes, trim
from mball.swap.place import digest
from mball.units import format_bytes

START_S = 3600.0
"""The manager gives up long before."""

_POLL_S = 0.1
_ANSWER_S = 5.0
_TERM_S = 5.0
_KILL_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="mball.server.worker.vllm_process", description=__doc__)
    parser.add_argument("--control-fd", type=int, required=True, help="the worker's end of the control channel")
    parser.add_argument("--spec", type=WorkerSpec.from_json, required=True, help="what to serve, as JSON")
    arguments = parser.parse_args()
    prctl.die_with_parent()
    return asyncio.run(run(arguments.control_fd, arguments.spec))


async def run(control_fd: int, spec: WorkerSpec, start: Start = fresh) -> int:
    """The exit code: 0 after a stop, 1 where the server did not start or ended by itself."""
    stopping = asyncio.Event()
    channel = control.Channel(socket.socket(fileno=control_fd))
    with stopped_by_signals(stopping), contextlib.closing(channel):
        try:
            vllm_compat.check_version()
            cold = await asyncio.to_thread(cold_layers, spec)
            arguments = vllm_options.arguments(spec, kv_bytes(spec), cold)
            environment = await asyncio.to_thread(_environment, spec, cold)
        except MballError as error:
            with contextlib.suppress(control.ChannelClosed):
                await channel.send({"event": "failed", "error": str(error)})
            return 1
        asker = control.Asker(channel)
        door = Door(vllm_options.kv_socket(spec), asker) if vllm_options.keeps_kv(spec) else None
        try:
            began, server = time.monotonic(), start(arguments, environment)
            try:
                return await _serve(server, began, spec, channel, asker, door, stopping)
            finally:
                await asyncio.to_thread(_end, server)
        finally:
            if door is not None:
                await door.close()
            _unlink_rows(spec)


def kv_bytes(spec: WorkerSpec) -> int:
    """What the KV cache is to have. Raises ConfigError where neither the configuration nor the files tell."""
    if spec.kv_cache_bytes is not None:
        return spec.kv_cache_bytes
    if (found := estimate(spec)) is not None and found.kv_bytes:
        return found.kv_bytes
    raise ConfigError(f"{spec.model}: give kv_cache_memory_bytes: its files don't tell how large its KV cache is to be")


def cold_layers(spec: WorkerSpec) -> Cold | None:
    """Those that are to be in host memory. Raises ConfigError where the files don't tell which, or it has no room."""
    if spec.resident_layers is None:
        return None
    if (found := estimate(spec)) is None:
        raise ConfigError(f"{spec.model}: resident_layers: its files don't tell what its layers take: leave it out")
    if found.cold_bytes > (host_has := host.memory_bytes()):
        raise ConfigError(
            f"{spec.model}: resident_layers leaves {format_bytes(found.cold_bytes)} of layers to host memory, which is "
            f"{format_bytes(host_has)} in all: let more stay, or use engine: transformers, which reads them from files"
        )
    return found.cold


def host_bytes(spec: WorkerSpec) -> int:
    """What its engine has of host memory as long as it lives: cold layers, and rows for KV blocks. Blocks."""
    found = estimate(spec) if spec.resident_layers is not None else None
    rows_bytes = (spec.kv_arena_bytes or 0) if vllm_options.keeps_kv(spec) else 0
    return rows_bytes + (0 if found is None else found.cold_bytes)


def check_fell(spec: WorkerSpec, weights_bytes: int) -> None:
    """Raises EngineUnsupported where layers that were to be in host memory are on the device all the same."""
    if (most_bytes := cold_most_bytes(spec)) is not None and weights_bytes > most_bytes:
        raise EngineUnsupported(
            f"{spec.model}: vLLM {vllm_compat.version()} took the options for cold layers and keeps "
            f"{format_bytes(weights_bytes)} of weights on the device, not {format_bytes(most_bytes)} at most: leave "
            "resident_layers out and give it a device where it fits, or use engine: transformers"
        )


def _environment(spec: WorkerSpec, cold: Cold | None) -> dict[str, str]:
    inherited = dict(os.environ) | ({} if cold is None else vllm_compat.offload_environment())
    # torch would take as many threads as it says, and vLLM binds them to fewer cores: two on one take turns.
    inherited.pop("MKL_NUM_THREADS", None)
    if (home := inherited.get("HOME")) is not None:
        root = inherited.setdefault("VLLM_CACHE_ROOT", str(cache_folder(spec, Path(home))))
        inherited.setdefault(TRITON_ENVIRONMENT, str(Path(root, "triton")))
    if not vllm_options.keeps_kv(spec):
        return vllm_options.environment(inherited)
    _check_room(spec)
    return vllm_options.environment(inherited, vllm_options.kv_socket(spec), kv_identity(spec))


def cache_folder(spec: WorkerSpec, home: Path) -> Path:
    """Where vLLM keeps what it has compiled, for each of its versions and for each model: so that it goes with them.
    vLLM's own keys say what of it is still right."""
    plain = "".join(c if c.isalnum() or c in "-._" else "_" for c in Path(spec.path).name)
    named = f"{plain}-{hashlib.sha256(os.fsencode(Path(spec.path).resolve())).hexdigest()[:12]}"
    return home / ".cache" / "mball" / "vllm" / vllm_compat.version() / named


def kv_identity(spec: WorkerSpec) -> str:
    """SHA-256 of the model's content, and of all that the configuration says of how it is computed. The name of a model
    and its folder do not count. Raises ReadError, UnsafeTensors."""
    folder = Path(spec.path)
    shards = [sampled(shard) for shard in Checkpoint.open(folder).shards]
    config = folder / "config.json"
    given = {"environment": spec.environment_digest} if spec.environment_digest else {}
    said = {"dtype": spec.dtype, "device": spec.device.split(":")[0], **given, **spec.engine_args}
    options = json.dumps(said, sort_keys=True)
    return digest(*shards, config.read_bytes() if config.is_file() else b"", options).hex()


def _check_room(spec: WorkerSpec) -> None:
    """Raises ConfigError where the rows don't fit: a page that can't be had there ends a process without a word."""
    wanted, free = spec.kv_arena_bytes or 0, shutil.disk_usage(vllm_compat.HOST_REGION_FOLDER).free
    if wanted > free:
        raise ConfigError(
            f"{spec.model}: kv_arena_bytes is {format_bytes(wanted)}, and {vllm_compat.HOST_REGION_FOLDER}, where vLLM "
            f"keeps them, has {format_bytes(free)} left: give less, or the container more (--shm-size)"
        )


def _unlink_rows(spec: WorkerSpec) -> None:
    """The memory that KV blocks lie in is the processes' that have it: none that is killed leaves it behind."""
    for path in vllm_compat.host_region_files(vllm_options.engine_id(spec)):
        path.unlink(missing_ok=True)


async def _serve(
    server: Server,
    began: float,
    spec: WorkerSpec,
    channel: control.Channel,
    asker: control.Asker,
    door: Door | None,
    stopping: asyncio.Event,
) -> int:
    client = VllmClient(spec.socket_path)
    ended = asyncio.create_task(asyncio.to_thread(server.wait), name="server")
    stop = asyncio.create_task(stopping.wait(), name="stop")
    manager = asyncio.create_task(_answer(client, began, spec, channel, asker, door, stopping), name="control")
    await asyncio.wait({ended, stop, manager}, return_when=asyncio.FIRST_COMPLETED)
    crashed = ended.done() and not stopping.is_set()
    failed = manager.exception() if manager.done() else None
    for task in (stop, manager):
        task.cancel()
    await asyncio.wait({stop, manager})
    await asyncio.to_thread(_end, server)
    await ended
    if failed is not None:
        sys.stderr.write(f"{failed}\n")
    return 1 if crashed or failed is not None else 0


async def _answer(
    client: VllmClient,
    began: float,
    spec: WorkerSpec,
    channel: control.Channel,
    asker: control.Asker,
    door: Door | None,
    stopping: asyncio.Event,
) -> None:
    """Says hello once the engine answers; returns when the manager's end closes. Raises TransitionError."""
    await _until_healthy(client)
    healthy = time.monotonic()
    _unlink_rows(spec)
    stages = await start_stages(client, began, healthy)
    sys.stderr.write(json.dumps({"event": "vllm started", "model": spec.model, **stages}) + "\n")
    awake, loaded = await describe(client), await fingerprints(client)
    # What the first steps have left to the next is no part of what stays while it sleeps.
    cached_bytes = await trim(client)
    try:
        await asyncio.to_thread(check_fell, spec, awake.weights_bytes)
    except EngineUnsupported as error:
        with contextlib.suppress(control.ChannelClosed):
            await channel.send({"event": "failed", "error": str(error)})
        raise
    held = awake.weights_bytes + awake.kv_bytes if awake.free_bytes is None else 0
    beside_bytes = await asyncio.to_thread(host_bytes, spec)
    with contextlib.suppress(control.ChannelClosed):
        await channel.send(
            {
                "event": "hello",
                "pid": os.getpid(),
                "resident": True,
                "stages": stages,
                "baseline_bytes": max(0, await private_bytes() - held),
                "weights_bytes": awake.weights_bytes,
                "kv_bytes": awake.kv_bytes,
                "image_bytes": sum(awake.image_bytes),
                "working_bytes": None if awake.free_bytes is None else cached_bytes,
                "host_bytes": beside_bytes,
            }
        )
        with contextlib.closing(VllmVerbs(spec, client, awake, loaded, stopping.set, door, beside_bytes)) as verbs:
            await control.serve(channel, verbs.table(), asker)


async def _until_healthy(client: VllmClient) -> None:
    """Nothing but its answer tells. Raises TransitionError after START_S."""
    began = time.monotonic()
    while True:
        try:
            await client.get("/health", deadline_s=_ANSWER_S)
            return
        except TransitionError:
            if time.monotonic() - began > START_S:
                raise
        await asyncio.sleep(_POLL_S)


def _end(server: Server) -> None:
    """TERM, then KILL. Its own children end with it, or with this process's group."""
    for end, deadline_s in ((server.terminate, _TERM_S), (server.kill, _KILL_S)):
        if server.poll() is not None:
            return
        end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(deadline_s)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MballError as error:
        sys.exit(str(error))
