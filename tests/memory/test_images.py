from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from mball.device.simulated import SimulatedDevice
from mball.errors import MballError
from mball.memory.estimate import Estimate
from mball.memory.pressure_watch import Gauge
from mball.units import GiB, MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Running, Serve, model

ROOM = 500 * MiB


async def ready(running: Running, name: str) -> None:
    await running.until(lambda: bool(running.state(name)["image_ready"]))


async def status(running: Running, name: str) -> dict[str, object]:
    worker = running.manager._models[name].worker
    assert worker is not None
    return await worker.call("status", deadline_s=5.0)


async def test_an_image_is_filled_after_the_first_promotion_and_serves_the_next(serve: Serve) -> None:
    running = await serve(model("a"), model("b"), dram_bytes=ROOM)
    await running.ask("a")
    await ready(running, "a")
    dram = running.manager.snapshot()["dram"]
    assert (dram["total_bytes"], dram["image_bytes"]) == (ROOM, 64 * MiB)
    await running.ask("b")
    assert running.state("a")["shown_as"] == "dram"
    assert (await status(running, "a"))["from_image"]
    await running.ask("a")
    assert running.state("a")["shown_as"] == "device"


async def test_a_model_that_was_demoted_while_its_image_was_filled_rises_to_dram(serve: Serve) -> None:
    running = await serve(model("a", Knobs(image_s=5.0)), model("b"), dram_bytes=ROOM)
    await running.ask("a")
    await running.ask("b")
    assert running.state("a")["shown_as"] == "source"
    await ready(running, "a")
    assert running.state("a")["shown_as"] == "dram"


async def test_an_image_outlives_its_worker_and_goes_to_the_next(serve: Serve) -> None:
    running = await serve(model("a"), dram_bytes=ROOM)
    await running.ask("a")
    await ready(running, "a")
    first = running.state("a")["pid"]
    os.kill(first, signal.SIGKILL)
    await running.until(lambda: running.state("a")["process"] == "gone")
    assert running.state("a")["shown_as"] == "dram"
    await running.ask("a")
    assert running.state("a")["pid"] != first
    assert (await status(running, "a"))["from_image"]


async def test_without_room_there_is_no_image(serve: Serve) -> None:
    running = await serve(model("a"), model("b"), dram_bytes=60 * MiB)
    await running.ask("a")
    await running.ask("b")
    assert running.state("a")["shown_as"] == "source"
    assert running.manager.snapshot()["dram"]["image_bytes"] == 0


async def test_the_least_valuable_image_goes_for_one_that_is_worth_more(serve: Serve) -> None:
    slow = Knobs(promote_s=0.3)
    running = await serve(model("rare", slow), model("often", slow), dram_bytes=100 * MiB)
    await running.ask("rare")
    await ready(running, "rare")
    await running.ask("often")
    assert running.state("rare")["shown_as"] == "dram"
    for _ in range(8):
        await running.ask("often")
    await ready(running, "often")
    assert running.state("rare")["image_bytes"] == 0
    assert running.state("rare")["shown_as"] == "source"
    assert running.manager.snapshot()["dram"]["image_bytes"] == 64 * MiB
    for name in ("rare", "often"):
        assert await running.ask(name) == f"{name} 1 2 3 "


@pytest.mark.parametrize("fault", ["crash_at", "fail_at"])
async def test_a_filling_that_fails_leaves_nothing_and_stops_nobody(
    serve: Serve, tmp_path: Path, device: SimulatedDevice, fault: str
) -> None:
    knobs = Knobs(times=1, counter=str(tmp_path / "n"), **{fault: "image"})  # type: ignore[arg-type]
    running = await serve(model("a", knobs), model("b"), dram_bytes=ROOM)
    await running.manager.load("a")
    await running.until(lambda: running.manager.snapshot()["dram"]["image_bytes"] == 64 * MiB)
    await running.until(lambda: running.manager.snapshot()["dram"]["image_bytes"] == 0)
    assert await running.ask("b") == "b 1 2 3 "
    assert await running.ask("a") == "a 1 2 3 "
    await ready(running, "a")
    assert device.refusals == 0


async def test_a_worker_that_does_not_let_go_of_an_image_is_killed(serve: Serve) -> None:
    slow = Knobs(promote_s=0.3, hang_at="drop_image")
    running = await serve(model("rare", slow), model("often", slow), dram_bytes=100 * MiB)
    await running.ask("rare")
    await ready(running, "rare")
    pid = running.state("rare")["pid"]
    for _ in range(8):
        await running.ask("often")
    await running.manager.unload("often")
    await running.ask("often")
    await ready(running, "often")
    await running.until(lambda: running.state("rare")["pid"] != pid)
    assert await running.ask("rare") == "rare 1 2 3 "


async def test_closing_frees_the_images(serve: Serve) -> None:
    running = await serve(model("a"), model("b", Knobs(image_s=30.0)), dram_bytes=ROOM)
    await running.ask("a")
    await ready(running, "a")
    await running.ask("b")
    await asyncio.sleep(0.1)
    await running.manager.close(1.0)
    links = await asyncio.to_thread(
        lambda: [str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
    )
    assert not [link for link in links if "memfd:" in link]
    assert running.manager.snapshot()["dram"]["image_bytes"] == 0


def workers_bytes(running: Running) -> int:
    found: int = running.manager.snapshot()["dram"]["worker_bytes"]
    return found


async def killed(running: Running, name: str) -> None:
    os.kill(running.state(name)["pid"], signal.SIGKILL)
    await running.until(lambda: running.state(name)["process"] == "gone")


async def test_images_have_what_workers_leave_them(serve: Serve, tmp_path: Path) -> None:
    """Layers and KV blocks in host memory are there as long as their process: images make way, and come back."""
    models = model("a"), model("b"), model("large", Knobs(host_bytes=100 * MiB, image_bytes=1 * GiB))
    calm = Gauge(tmp_path / "says nothing", available=lambda: 10 * GiB)
    running = await serve(*models, dram_bytes=180 * MiB, settings=replace(QUICK, pressure_s=0.05), gauge=calm)
    for name in "ab":
        await running.ask(name)
        await ready(running, name)
    await running.ask("large")
    await running.until(lambda: running.manager.snapshot()["dram"]["image_bytes"] == 64 * MiB)
    dram = running.manager.snapshot()["dram"]
    assert (dram["worker_bytes"], dram["limit_bytes"], dram["pressure"]["pressed"]) == (100 * MiB, 80 * MiB, False)
    dropped = [event.reason for event in running.manager.events.recent(100) if event.kind == "image dropped"]
    # Another may go after it: for the dropped one, should that be worth more.
    assert "100 MiB of dram_bytes are for workers' layers and KV blocks" in dropped[0]
    assert running.manager.snapshot()["books_wrong"] == []
    await killed(running, "large")
    assert workers_bytes(running) == 0
    assert running.manager.snapshot()["dram"]["limit_bytes"] == 180 * MiB
    for name in "ab":
        await running.ask(name)
        await ready(running, name)


async def test_what_lies_aside_while_a_model_sleeps_counts(serve: Serve) -> None:
    knobs = Knobs(host_bytes=10 * MiB, aside_bytes=30 * MiB)
    running = await serve(model("a", knobs), model("b"), dram_bytes=ROOM)
    await running.ask("a")
    assert workers_bytes(running) == 10 * MiB
    await running.ask("b")
    assert workers_bytes(running) == running.state("a")["host_bytes"] == 40 * MiB
    await running.ask("a")
    assert workers_bytes(running) == 10 * MiB
    await killed(running, "a")
    assert workers_bytes(running) == 0


async def test_layers_in_host_memory_count_before_they_are_there(serve: Serve) -> None:
    knobs = Knobs(start_s=1.5, cannot_start="no")
    running = await serve(model("a", knobs), dram_bytes=ROOM, settings=replace(QUICK, start_attempts=1))
    running.manager._models["a"].estimate = Estimate(64 * MiB, 16 * MiB, None, 300 * MiB)
    asking = asyncio.create_task(running.ask("a"))
    await running.until(lambda: running.state("a")["process"] == "starting")
    assert running.manager.snapshot()["dram"]["limit_bytes"] == ROOM - 300 * MiB
    with pytest.raises(MballError):
        await asking
    assert workers_bytes(running) == 0


async def test_more_than_the_budget_is_told_and_costs_the_images_alone(serve: Serve) -> None:
    running = await serve(model("a", Knobs(host_bytes=2 * GiB)), model("b"), dram_bytes=1 * GiB)
    for name in "abab":
        assert await running.ask(name) == f"{name} 1 2 3 "
    [told] = [event for event in running.manager.events.recent(100) if event.kind == "host memory over budget"]
    assert "2.0 GiB of host memory for layers and KV blocks, and dram_bytes is 1.0 GiB" in told.reason
    dram = running.manager.snapshot()["dram"]
    assert (dram["image_bytes"], dram["limit_bytes"]) == (0, 0)
    assert running.manager.snapshot()["books_wrong"] == []
