"""`mball serve` with the two models, asked as any client asks it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import yaml

from mball.bench.runner import Outcome
from mball.bench.served import Served
from mball.bench.switch_stock import rates
from mball.errors import MballError
from mball.server.run import bind

if TYPE_CHECKING:
    from mball.bench.switch import Options

_END_S = 60.0
_IMAGE_S = 30.0
_SLACK_BYTES = 512 << 20
_STATE = "/mball/v1/state"


async def both_at_once(options: Options, folder: Path, outcome: Outcome, after: Callable[[str], None]) -> None:
    """Asked for at one moment, with room for both: each gets its bytes, or `MballError`."""
    async with _serving(options, folder, 2 * options.room()) as (first, second):
        began = time.monotonic()
        await asyncio.gather(first.say(1), second.say(1))
        outcome.facts["together_s"] = time.monotonic() - began
        models = await _models(first)
        if wrong := [model["name"] for model in models if model["crashes"] or model["shown_as"] != "device"]:
            raise MballError(f"{' and '.join(wrong)}: started at once, and not both on the device")
        outcome.facts["together_bytes"] = [model["device_bytes"] for model in models]
    after(f"both at once in {outcome.facts['together_s']:.1f} s")


async def in_turn(options: Options, folder: Path, outcome: Outcome, after: Callable[[str], None]) -> None:
    """Raises MballError."""
    async with _serving(options, folder, options.room()) as served:
        began = time.monotonic()
        await served[0].say(1)
        outcome.facts["ready_s"] = time.monotonic() - began
        after(f"started in {outcome.facts['ready_s']:.1f} s")
        before = (await served[0].say(8)).text
        outcome.facts |= {f"filling_{name}": rate for name, rate in (await rates(served[0], options)).items()}
        outcome.facts["image_before"] = await _image_is_there(served[0])
        outcome.facts |= await rates(served[0], options)
        outcome.facts["same"] = (await served[1].say(8)).text == before
        # Whoever comes back for the first time, too.
        await served[0].say(8)
        after("both were there")
        seen = _last(await _events(served[0]))
        for number in range(options.switches):
            said = await served[(number + 1) % 2].say(8)
            outcome.facts["same"] = outcome.facts["same"] and said.text == before
            outcome.rounds.append({"switch_s": said.first_token_s})
        events = await _events(served[0])
        new = [event for event in events if event["number"] > seen]
        for kind, measure in (("demoted", "sleep_s"), ("promoted", "wake_s")):
            took = [event[f"{kind[:-1]}_s"] for event in new if event["kind"] == kind]
            if len(took) != options.switches:
                raise MballError(f"{len(took)} times a model was {kind}, of {options.switches}: {_instead(new)}")
            for measures, seconds in zip(outcome.rounds, took, strict=True):
                measures[measure] = seconds
        outcome.facts |= _told(events)
        models = await _models(served[0])
        asleep = [model for model in models if model["shown_as"] != "device"]
        outcome.facts["held_bytes"] = max(model["device_bytes"] for model in asleep)
        outcome.facts["held_promised_bytes"] = max(model["promised_bytes"] for model in asleep)
        after(f"{options.switches} switches")


def _instead(events: list[dict[str, Any]]) -> str:
    """Why the models did not take turns."""
    stopped = [event for event in events if event["kind"] in ("stopped", "ended")]
    if not stopped:
        return "they fit both at once"
    return f"{len(stopped)} times one was stopped ({stopped[-1].get('reason') or stopped[-1]['kind']})"


def _told(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the first start, the first sleep and the filling of an image."""
    first = {kind: next((e for e in events if e["kind"] == kind), {}) for kind in ("started", "demoted", "image ready")}
    stages = {name: value for name, value in first["started"].items() if name.endswith("_s")}
    found = {"stages": stages, "first_sleep_s": first["demoted"].get("demote_s")}
    return {**found, "fill_s": first["image ready"].get("fill_s")}


def _last(events: list[dict[str, Any]]) -> int:
    return max((event["number"] for event in events), default=0)


async def _image_is_there(served: Served) -> bool:
    """Its first sleep is to have nothing to wait for; where no image is made, it has not."""
    return any(event["kind"] == "image ready" for event in await _events(served, _IMAGE_S, "image ready"))


async def _events(served: Served, seconds: float = 1.0, until: str | None = None) -> list[dict[str, Any]]:
    """All that are kept, and those that come meanwhile, up to the first of the kind `until`."""
    found: list[dict[str, Any]] = []
    async with served.session.get("/mball/v1/events", params={"recent": 1024}) as answer:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for line in answer.content:
                    if line.startswith(b"data:"):
                        found.append(yaml.safe_load(line.removeprefix(b"data:")))
                        if found[-1]["kind"] == until:
                            break
    return found


async def _models(served: Served) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = (await served.call("GET", _STATE))["models"]
    return models


@contextlib.asynccontextmanager
async def _serving(options: Options, folder: Path, room_bytes: int) -> AsyncIterator[list[Served]]:
    spec = options.spec("")
    model: dict[str, Any] = {
        "path": spec.path,
        "engine": spec.engine,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "kv_cache_memory_bytes": spec.kv_cache_bytes,
        "engine_args": spec.engine_args,
    }
    if options.vllm is not None:
        model["engine_python"] = str(options.vllm)
    config = folder / "mball.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "models": [{**model, "name": name} for name in ("a", "b")],
                "device": options.device,
                "device_memory_bytes": room_bytes,
                "dram_bytes": options.dram_bytes,
                "start_timeout_s": options.timeout_s,
                "queue_timeout_s": options.timeout_s,
                # Nobody has to stay: a switch is as long as it is.
                "swap_time_share": 1.0,
                "state_dir": str(folder / "state"),
                "log_dir": str(folder / "logs"),
            }
        )
    )
    with bind("127.0.0.1", 0) as sock, (folder / "mball.log").open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "mball", "serve", "--config", str(config)],
            *["--fd", str(sock.fileno()), "--parent", str(os.getpid())],
            stdout=out,
            stderr=out,
            pass_fds=[sock.fileno()],
        )
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    timeout = aiohttp.ClientTimeout(total=options.timeout_s)
    try:
        async with aiohttp.ClientSession(address, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            yield [Served(session, "a"), Served(session, "b")]
    except aiohttp.ClientError as error:
        said = (await asyncio.to_thread((folder / "mball.log").read_text, errors="replace")).strip().splitlines()[-1:]
        raise MballError(f"mball serve: {error!r} {' '.join(said)}") from error
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
