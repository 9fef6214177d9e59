"""Engines whose workers are on the device once they have started."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mball.device.simulated import SimulatedDevice
from mball.errors import ModelDoesNotFit, ModelFailed
from mball.memory.spec import ModelSpec
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Running, Serve, model, slot_of
from tests.sparse_model import sparse_model

ROOM = 500 * MiB


def eager(name: str, knobs: Knobs | None = None, **options: Any) -> ModelSpec:
    spec = model(name, knobs, **options)
    return replace(spec, worker=replace(spec.worker, engine="vllm", kv_cache_bytes=16 * MiB))


async def test_it_answers_once_it_has_started(serve: Serve) -> None:
    running = await serve(eager("a"))
    assert await running.ask("a")
    state = running.state("a")
    assert (state["shown_as"], state["starts"], state["promotions"]) == ("device", 1, 0)
    assert state["device_bytes"] == 81 * MiB
    assert state["promised_bytes"] == 81 * MiB
    assert running.manager._models["a"].context_bytes == 1 * MiB


async def test_room_is_made_before_it_starts(serve: Serve, device: SimulatedDevice) -> None:
    """Known from its first start on: it takes all at once, so the other has to have left by then."""
    running = await serve(model("b"), eager("a"), settings=replace(QUICK, max_wait_s=0.2))
    await running.ask("a")
    await running.manager.unload("a")
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    await running.until(lambda: running.state("a")["process"] == "gone")
    await running.ask("b")
    assert running.state("a")["process"] == "gone"
    await running.ask("a")
    assert running.state("a")["crashes"] == 1
    assert running.state("b")["shown_as"] != "device"


async def test_it_sleeps_for_another_and_comes_back(serve: Serve) -> None:
    running = await serve(eager("a"), model("b"), dram_bytes=ROOM)
    await running.ask("a")
    await running.until(lambda: bool(running.state("a")["image_ready"]))
    first = running.state("a")["pid"]
    for _ in range(2):
        await running.ask("b")
        assert running.state("a")["shown_as"] == "dram"
        assert running.state("a")["promised_bytes"] == 1 * MiB
        await running.ask("a")
        assert (running.state("a")["shown_as"], running.state("a")["pid"]) == ("device", first)
    assert running.state("a")["promotions"] == 2
    assert not running.manager.snapshot()["books_wrong"]


async def test_what_a_step_wants_again_is_no_reason_to_stop_who_could_sleep(serve: Serve, tmp_path: Path) -> None:
    """As with vLLM on several GPUs: room for one awake beside one asleep, and hardly more."""
    device = SimulatedDevice.create(tmp_path / "tight", 172 * MiB, context_bytes=22 * MiB)
    knobs = Knobs(weights_bytes=75 * MiB, kv_bytes=20 * MiB, working_bytes=25 * MiB)
    path = sparse_model(tmp_path / "m", layers=8, layer_bytes=9 * MiB, rest_bytes=3 * MiB)
    specs = [eager(name, knobs) for name in "ab"]
    specs = [replace(s, worker=replace(s.worker, path=str(path), kv_cache_bytes=20 * MiB)) for s in specs]
    running = await serve(*specs, on=device, dram_bytes=ROOM, settings=replace(QUICK, slack_bytes=2 * MiB))
    for name in "ababab":
        await running.ask(name)
    assert [running.state(name)["starts"] for name in "ab"] == [1, 1]
    assert running.state("a")["device_bytes"] == 22 * MiB
    assert not running.manager.snapshot()["books_wrong"]


async def test_what_was_thought_to_stay_is_measured_when_it_sleeps(serve: Serve) -> None:
    running = await serve(eager("a", Knobs(extra_bytes=15 * MiB)), model("b"), dram_bytes=ROOM)
    await running.ask("a")
    assert running.manager._models["a"].context_bytes == 16 * MiB
    await running.ask("b")
    assert running.manager._models["a"].context_bytes == 1 * MiB
    assert running.manager._models["a"].figures.needs.context_bytes == 1 * MiB


async def test_its_image_goes_with_its_worker(serve: Serve) -> None:
    """It is of that process's memory: the next one's is another."""
    running = await serve(eager("a"), dram_bytes=ROOM)
    await running.ask("a")
    await running.until(lambda: bool(running.state("a")["image_ready"]))
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    await running.until(lambda: running.state("a")["process"] == "gone")
    assert running.state("a")["shown_as"] == "stopped"
    assert running.manager.snapshot()["dram"]["image_bytes"] == 0
    await running.ask("a")
    await running.until(lambda: bool(running.state("a")["image_ready"]))


async def test_its_image_is_not_filled_while_it_sleeps(serve: Serve) -> None:
    """It is made of what is on the device; others' images are filled first where their loads are long."""
    slow = Knobs(promote_s=0.3)
    running = await serve(eager("a", slow), model("b", slow), dram_bytes=ROOM, settings=replace(QUICK, hold_s=0.01))
    await running.ask("a")
    await running.until(lambda: bool(running.state("a")["image_ready"]))
    for _ in range(2):
        await running.ask("b")
        await running.ask("a")
    await running.ask("b")
    await running.manager._images.drop(running.manager._models["a"], "for a test")
    assert running.state("a")["shown_as"] == "source"
    await running.ask("a")
    await running.until(lambda: bool(running.state("a")["image_ready"]))
    why = [event.reason for event in running.manager.events.recent(100) if event.kind == "image dropped"]
    assert why == ["for a test"]


async def test_one_that_gives_no_token_is_started_again(serve: Serve, tmp_path: Path) -> None:
    running = await serve(eager("a", Knobs(fail_at="canary", times=1, counter=str(tmp_path / "times"))))
    await running.ask("a")
    assert (running.state("a")["starts"], running.state("a")["crashes"]) == (2, 1)


async def test_one_that_can_never_fit_is_refused(serve: Serve) -> None:
    running = await serve(eager("a", Knobs(weights_bytes=200 * MiB, kv_bytes=0)))
    with pytest.raises(ModelFailed):
        await running.ask("a", deadline_s=20.0)
    assert slot_of(running.manager).ledger.promised_bytes == 0


async def test_a_start_is_told_how_busy_it_was_lately(serve: Serve) -> None:
    running = await serve(eager("a", Knobs(token_s=0.3)))
    busy = running.manager._models["a"].figures.busy
    asked = [asyncio.create_task(running.ask("a")) for _ in range(3)]
    await running.until(lambda: busy.value == 3)
    first = running.manager._models["a"].worker
    assert first is not None
    assert first.spec.busy_requests == 0, "not known yet"
    await asyncio.gather(*asked)
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    await running.until(lambda: running.state("a")["process"] == "gone")
    await running.ask("a")
    second = running.manager._models["a"].worker
    assert second is not None
    assert second.spec.busy_requests == 3


COLD = Knobs(weights_bytes=104 * MiB, kv_bytes=8 * MiB)
"""Of a model of eight layers with 200 MiB of weights, as vLLM holds it with six of them in host memory."""


async def large(serve: Serve, folder: Path, *others: ModelSpec, device_bytes: int, devices: int = 1) -> Running:
    path = sparse_model(folder / "b", layers=8, layer_bytes=24 * MiB, rest_bytes=8 * MiB)
    spec = eager("b", COLD)
    worker = replace(spec.worker, path=str(path), kv_cache_bytes=8 * MiB)
    made = [SimulatedDevice.create(folder / f"{n}", device_bytes, context_bytes=1 * MiB) for n in range(devices)]
    return await serve(replace(spec, worker=worker), *others, on=made)


async def test_one_that_can_never_fit_whole_starts_with_cold_layers(serve: Serve, tmp_path: Path) -> None:
    running = await large(serve, tmp_path, device_bytes=200 * MiB)
    assert await running.ask("b")
    assert (running.state("b")["starts"], running.state("b")["promised_bytes"]) == (1, 113 * MiB)
    assert running.manager._models["b"].spec.worker.resident_layers == 2


async def test_one_that_what_is_pinned_leaves_too_little_starts_with_cold_layers(serve: Serve, tmp_path: Path) -> None:
    pinned = model("a", Knobs(weights_bytes=170 * MiB), pinned=True)
    running = await large(serve, tmp_path, pinned, device_bytes=400 * MiB)
    await running.ask("a")
    assert running.manager._models["b"].spec.worker.resident_layers is None
    assert await running.ask("b")
    assert running.manager._models["b"].spec.worker.resident_layers == 2
    assert (running.state("b")["starts"], running.state("a")["shown_as"]) == (1, "device")
    assert running.manager._models["b"].estimate is not None, "its start reserved what it takes so"
    [told] = [event for event in running.manager.events.recent(100) if event.kind == "streams"]
    assert "left beside pinned a" in told.reason
    assert not running.manager.snapshot()["books_wrong"]


async def test_one_that_does_not_fit_with_cold_layers_either_is_refused(serve: Serve, tmp_path: Path) -> None:
    pinned = model("a", Knobs(weights_bytes=300 * MiB), pinned=True)
    running = await large(serve, tmp_path, pinned, device_bytes=400 * MiB)
    await running.ask("a")
    with pytest.raises(ModelDoesNotFit, match="left beside pinned a"):
        await running.ask("b", deadline_s=20.0)
    assert running.manager._models["b"].spec.worker.resident_layers is None


@pytest.mark.parametrize(("pinned", "resident"), [("a", None), ("ac", 2)])
async def test_cold_layers_are_for_where_no_other_device_has_room(
    serve: Serve, tmp_path: Path, pinned: str, resident: int | None
) -> None:
    others = [model(name, Knobs(weights_bytes=190 * MiB), pinned=True) for name in pinned]
    running = await large(serve, tmp_path, *others, device_bytes=400 * MiB, devices=2)
    for name in pinned:
        await running.ask(name)
    assert await running.ask("b")
    assert running.manager._models["b"].spec.worker.resident_layers == resident
    assert all(running.state(name)["shown_as"] == "device" for name in pinned)
