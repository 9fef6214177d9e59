"""Foreign use of a device: seen, charged, and never touched."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mball.device.simulated import SimulatedDevice
from mball.errors import ModelDoesNotFit
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import Running, Serve, model

SMALL = Knobs(weights_bytes=8 * MiB, kv_bytes=4 * MiB)


class Stranger:
    """A process of somebody else's that holds bytes of a device (a context first)."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        device.attach(self.process.pid)

    def take(self, nbytes: int) -> None:
        self.device.take(self.process.pid, nbytes)

    def end(self) -> None:
        self.process.communicate(b"\n")

    @property
    def lives(self) -> bool:
        return self.process.poll() is None


@pytest.fixture
def stranger(device: SimulatedDevice) -> Iterator[Stranger]:
    found = Stranger(device)
    yield found
    with contextlib.suppress(ValueError):
        found.end()


def told(running: Running, kind: str) -> list[str]:
    return [event["reason"] for event in running.manager.snapshot()["events"] if event["kind"] == kind]


def foreign(running: Running) -> int:
    nbytes: int = running.manager.snapshot()["devices"][0]["foreign_bytes"]
    return nbytes


async def test_it_is_seen_told_once_and_charged(serve: Serve, device: SimulatedDevice, stranger: Stranger) -> None:
    running = await serve(model("a", SMALL))
    stranger.take(50 * MiB)
    await running.until(lambda: foreign(running) == 51 * MiB)
    state = running.manager.snapshot()["devices"][0]
    assert (state["limit_bytes"], state["total_bytes"]) == (69 * MiB, 120 * MiB)
    stranger.take(5 * MiB)
    await running.until(lambda: foreign(running) == 56 * MiB)
    [text] = told(running, "foreign use")
    assert f"(pid {stranger.process.pid}) holds" in text
    assert "python" in text
    assert await running.ask("a") == "a 1 2 3 ", "beside it"
    assert foreign(running) == 56 * MiB, "our own workers are not foreign"
    await asyncio.to_thread(stranger.end)
    await running.until(lambda: foreign(running) == 0)
    assert running.manager.snapshot()["devices"][0]["limit_bytes"] == 120 * MiB
    assert len(told(running, "foreign use ended")) == 1


async def test_what_a_budget_leaves_free_is_not_taken_from_it(
    serve: Serve, device: SimulatedDevice, stranger: Stranger
) -> None:
    running = await serve(model("a", SMALL), device_bytes=60 * MiB)
    stranger.take(30 * MiB)
    await running.until(lambda: foreign(running) == 31 * MiB)
    assert running.manager.snapshot()["devices"][0]["limit_bytes"] == 60 * MiB


async def test_idle_models_make_way_and_come_back_when_it_is_gone(
    serve: Serve, device: SimulatedDevice, stranger: Stranger
) -> None:
    running = await serve(model("idle", SMALL, working_bytes=30 * MiB), model("busy", Knobs(weights_bytes=20 * MiB)))
    await running.ask("idle")
    async with running.manager.admit("busy"):
        stranger.take(49 * MiB)
        await running.until(lambda: running.state("idle")["weights"] != "device")
        assert foreign(running) == 50 * MiB
        assert running.state("busy")["weights"] == "device"
        assert running.state("busy")["open"]
    [reason] = [text for text in told(running, "demoted") if "held by others" in text]
    assert "of what was promised" in reason
    await asyncio.to_thread(stranger.end)
    assert await running.ask("idle") == "idle 1 2 3 "
    assert running.manager.snapshot()["books_wrong"] == []
    assert device.refusals == 0


async def test_where_the_idle_are_too_few_a_busy_one_is_drained_and_the_stranger_lives(
    serve: Serve, device: SimulatedDevice, stranger: Stranger
) -> None:
    running = await serve(model("busy", Knobs(token_s=0.1), working_bytes=30 * MiB))
    await running.manager.load("busy")
    inside = asyncio.create_task(running.ask("busy"))
    await running.until(lambda: running.state("busy")["in_flight"] == 1)
    stranger.take(30 * MiB)
    await running.until(lambda: not running.state("busy")["open"])
    assert await inside == "busy 1 2 3 ", "what was inside got its whole answer"
    await running.until(lambda: running.state("busy")["weights"] != "device")
    assert stranger.lives
    says = r"needs 110 MiB more, but 88\.0 MiB are left beside 31\.0 MiB that other processes hold: end those"
    with pytest.raises(ModelDoesNotFit, match=says):
        await running.ask("busy")
    await asyncio.to_thread(stranger.end)
    await running.until(lambda: foreign(running) == 0)
    assert await running.ask("busy") == "busy 1 2 3 "


async def test_a_pinned_model_stays_whatever_others_hold(
    serve: Serve, device: SimulatedDevice, stranger: Stranger
) -> None:
    running = await serve(model("a", SMALL, working_bytes=60 * MiB, pinned=True))
    await running.ask("a")
    stranger.take(59 * MiB)
    await running.until(lambda: foreign(running) == 60 * MiB)
    assert await running.ask("a") == "a 1 2 3 "
    assert running.state("a")["demotions"] == 0
