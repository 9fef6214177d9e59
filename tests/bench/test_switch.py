"""The benchmark of switches, small: `mball serve` with its embedded engine, and a pretended vLLM for the peer."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mball.bench.runner import Outcome
from mball.bench.switch import MBALL, STOCK, Options, p95, run_switch
from mball.bench.switch_mball import _instead
from mball.bench.switch_stock import by_hand
from mball.device.simulated import SimulatedDevice
from mball.errors import MballError
from mball.server.models import random as random_models
from mball.units import GiB, MiB

VLLM = """
import asyncio, json, os, sys
from aiohttp import web
options = sys.argv[sys.argv.index("vllm.entrypoints.openai.api_server") + 1:]
value = lambda name: options[options.index(name) + 1]
assert "--enable-sleep-mode" in options and os.environ["VLLM_SERVER_DEV_MODE"] == "1", options
asleep = False
async def health(request):
    return web.Response()
async def sleep(request):
    global asleep
    assert not asleep and request.query["level"] == "1"
    asleep = True
    return web.Response()
async def wake(request):
    global asleep
    assert asleep
    asleep = False
    return web.Response()
async def say(request):
    body = await request.json()
    assert not asleep and body["model"] == value("--served-model-name")
    text = {text}
    answer = web.StreamResponse(headers={{"content-type": "text/event-stream"}})
    await answer.prepare(request)
    for number in range(body["max_tokens"]):
        await answer.write(b"data: " + json.dumps({{"choices": [{{"text": text}}]}}).encode() + b"\\n\\n")
    usage = {{"completion_tokens": body["max_tokens"] - {short}}}
    await answer.write(b"data: " + json.dumps({{"choices": [], "usage": usage}}).encode() + b"\\n\\ndata: [DONE]\\n\\n")
    return answer
app = web.Application()
app.add_routes([web.get("/health", health), web.post("/sleep", sleep), web.post("/wake_up", wake)])
app.add_routes([web.post("/v1/completions", say)])
{fails}
web.run_app(app, path=value("--uds"), print=None)
"""

Pretend = Callable[..., Options]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    random_models.make("llama", tmp_path / "model", size_bytes=8 * MiB, seed=1, dtype="float32")
    SimulatedDevice.create(tmp_path / "gpu", 400 * MiB, context_bytes=1 * MiB)
    return Options(
        tmp_path / "model",
        device=f"simulated:{tmp_path / 'gpu'}",
        kv_bytes=16 * MiB,
        dram_bytes=64 * MiB,
        room_bytes=70 * MiB,
        switches=4,
        batches=(1, 2),
        tokens=16,
        timeout_s=120,
    )


@pytest.fixture
def pretend(tmp_path: Path, options: Options) -> Pretend:
    def make(*, text: str = "'x'", short: int = 0, fails: str = "") -> Options:
        program = tmp_path / "vllm.py"
        program.write_text(VLLM.format(text=text, short=short, fails=fails))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
        python.chmod(0o700)
        return dataclasses.replace(options, vllm=python)

    return make


def test_two_models_take_turns_under_serve(options: Options, tmp_path: Path) -> None:
    json_path, page = tmp_path / "switch.json", tmp_path / "switch.md"
    console = Console(record=True, width=200)
    assert run_switch(options, json_path=json_path, markdown_path=page, console=console), console.export_text()
    [outcome] = json.loads(json_path.read_text())["reports"][0]["outcomes"]
    assert outcome["name"] == MBALL
    assert len(outcome["rounds"]) == options.switches
    for measures in outcome["rounds"]:
        assert measures["switch_s"] > measures["wake_s"] > 0
        assert measures["sleep_s"] > 0
    facts = outcome["facts"]
    assert facts["tokens_1"] > 0
    assert facts["tokens_2"] > 0
    assert len(facts["together_bytes"]) == 2
    assert facts["stages"]
    assert "Both asked for at once" in page.read_text()


def test_two_that_both_fit_are_no_switch(options: Options, tmp_path: Path) -> None:
    roomy = dataclasses.replace(options, room_bytes=200 * MiB, together=False)
    console = Console(record=True, width=200)
    assert not run_switch(roomy, json_path=None, markdown_path=None, console=console)
    assert "they fit both at once" in console.export_text()


async def test_the_peer_by_hand(pretend: Pretend, tmp_path: Path) -> None:
    outcome = Outcome(STOCK)
    await by_hand(options := pretend(), tmp_path, outcome, lambda _: None)
    assert outcome.facts["same"]
    assert len(outcome.rounds) == options.switches
    assert all(r["switch_s"] >= r["sleep_s"] + r["wake_s"] for r in outcome.rounds)
    assert outcome.facts["held_bytes"] < GiB


async def test_a_peer_that_answers_otherwise_after_a_sleep_is_told(pretend: Pretend, tmp_path: Path) -> None:
    outcome = Outcome(STOCK)
    await by_hand(pretend(text="value('--served-model-name')"), tmp_path, outcome, lambda _: None)
    assert not outcome.facts["same"]


async def test_a_peer_that_says_too_little_or_does_not_start(pretend: Pretend, tmp_path: Path) -> None:
    with pytest.raises(MballError, match="7 tokens came of 8"):
        await by_hand(pretend(short=1), tmp_path, Outcome(STOCK), lambda _: None)
    with pytest.raises(MballError, match="did not start: ValueError: no memory"):
        await by_hand(pretend(fails="raise ValueError('no memory')"), tmp_path, Outcome(STOCK), lambda _: None)


def test_the_95th_of_a_hundred() -> None:
    outcome = Outcome(MBALL, rounds=[{"switch_s": float(number)} for number in range(100)])
    assert p95(outcome) == 95


def test_on_several_gpus_a_model_is_spread_over_them(tmp_path: Path) -> None:
    random_models.make("llama", tmp_path / "m", size_bytes=8 * MiB)
    names = [SimulatedDevice.create(tmp_path / name, GiB).name for name in ("one", "two")]
    alone = Options(tmp_path / "m", Path(sys.executable), names[0])
    spread = dataclasses.replace(alone, device="+".join(names))
    assert (alone.spec("a").ranks, spread.spec("a").ranks) == (1, 2)
    assert spread.spec("a").device == "+".join(names)
    # Half of the weights on each, and each rank's context on the other's, too.
    assert spread.room() - alone.room() == pytest.approx(3 * GiB - 1.5 * 4 * MiB, rel=0.001)


def test_models_that_are_stopped_where_they_should_take_turns_are_told_of() -> None:
    demoted, told = {"kind": "demoted"}, {"kind": "stopped", "reason": "for b: its memory is needed"}
    assert _instead([demoted]) == "they fit both at once"
    assert _instead([demoted, {"kind": "ended"}, told]) == "2 times one was stopped (for b: its memory is needed)"
