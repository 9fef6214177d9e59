"""Host pressure: images go before the kernel acts, come back when it eases, and nothing flaps."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from mball.memory.pressure import Reading, Throttle, parse, reserve_bytes
from mball.memory.pressure_watch import Gauge
from mball.units import GiB, MiB
from tests.fake_worker import Knobs, command
from tests.memory.conftest import QUICK, Running, model

CALM_S = 10.0
QUIET = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
STALLED = "some avg10=40.00 avg60=1.00 avg300=0.00 total=9\nfull avg10=12.50 avg60=0.00 avg300=0.00 total=5\n"


def test_psi_is_parsed() -> None:
    assert parse(QUIET) == (0.0, 0.0)
    assert parse(STALLED) == (40.0, 12.5)
    assert parse(STALLED.splitlines()[0]) == (40.0, 0.0)
    for text in ("nonsense", "some avg60=1.0", "some avg10=x"):
        with pytest.raises(ValueError):
            parse(text)


def test_images_may_have_what_the_host_can_spare() -> None:
    throttle = Throttle(100, 10, CALM_S)
    assert throttle.take(Reading(50), 30, 0.0) == 60
    assert throttle.take(Reading(500), 30, 1.0) == 100
    assert not throttle.pressed


def test_a_shortage_falls_at_once_and_rises_after_a_calm() -> None:
    throttle = Throttle(100, 10, CALM_S)
    throttle.take(Reading(500), 80, 0.0)
    assert throttle.take(Reading(6), 80, 1.0) == 80 - 14
    assert throttle.pressed
    assert throttle.take(Reading(20), 66, 2.0) == 66, "no rise at once"
    assert throttle.take(Reading(60), 66, 5.0) == 66
    assert throttle.take(Reading(15), 66, 9.0) == 66, "the calm begins anew"
    assert throttle.take(Reading(60), 66, 13.0) == 66
    assert throttle.take(Reading(60), 66, 13.0 + CALM_S) == 100
    assert not throttle.pressed


def test_between_the_marks_nothing_goes_and_nothing_comes() -> None:
    throttle = Throttle(100, 10, CALM_S)
    assert throttle.take(Reading(15), 50, 0.0) == 50
    assert not throttle.pressed


def test_work_that_stands_still_takes_a_quarter_whatever_is_available() -> None:
    throttle = Throttle(100, 10, CALM_S)
    assert throttle.take(Reading(1000, some=50.0, full=10.0), 80, 0.0) == 60
    assert throttle.take(Reading(1000, some=50.0, full=10.0), 60, 1.0) == 45


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40), st.floats(0, 20)), min_size=1, max_size=40))
def test_the_limit_never_flaps(steps: list[tuple[int, int, float]]) -> None:
    throttle, now_s, held, pressed_s = Throttle(100, 10, CALM_S), 0.0, 0, float("-inf")
    for available, stall, pause_s in steps:
        now_s += pause_s
        before = throttle.limit_bytes
        limit = throttle.take(Reading(available, full=float(stall)), held, now_s)
        assert 0 <= limit <= 100
        assert limit <= max(held, held + available - 20)
        if available < 10 or stall >= 5:
            pressed_s = now_s
            assert limit <= held
        elif now_s - pressed_s < CALM_S:
            assert limit <= before, "it rose while the pressure was just over"
        held = min(limit, held + available // 3)


def test_the_reserve_follows_the_host() -> None:
    assert reserve_bytes(1 * GiB) == 256 * MiB
    assert reserve_bytes(24 * GiB) == 24 * GiB // 20
    assert reserve_bytes(2048 * GiB) == 4 * GiB


def test_a_gauge_reads_and_waits_without_a_trigger(tmp_path: Path) -> None:
    psi = tmp_path / "memory.pressure"
    psi.write_text(STALLED)
    psi.chmod(0o444)
    gauge = Gauge(psi, available=lambda: 7)
    assert gauge.read() == Reading(7, 40.0, 12.5)
    gauge.wait(0.01)
    gauge.stop()
    gauge.wait(30)
    gauge.close()


def test_a_gauge_works_where_the_kernel_says_nothing(tmp_path: Path) -> None:
    gauge = Gauge(tmp_path / "none", available=lambda: 7)
    assert not gauge.triggers
    assert gauge.read() == Reading(7)
    gauge.close()


def test_a_trigger_is_set_where_it_is_allowed() -> None:
    psi = Path("/proc/pressure/memory")
    if not os.access(psi, os.W_OK):
        pytest.skip("no PSI here, or no leave to set a trigger")
    gauge = Gauge(psi)
    assert gauge.triggers
    gauge.wait(0.01)
    gauge.close()


class Host:
    """A host whose memory is what the test says."""

    def __init__(self, psi: Path) -> None:
        self.available_bytes = 10 * GiB
        self.psi = psi
        psi.write_text(QUIET)

    def gauge(self) -> Gauge:
        return Gauge(self.psi, available=lambda: self.available_bytes)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "memory.pressure")


@pytest.fixture
async def running(host: Host, device: SimulatedDevice, runtime_dir: Path) -> AsyncIterator[Running]:
    """Three models, whose images fit, on a host that keeps 100 MiB for others."""
    slow = Knobs(weights_bytes=32 * MiB, kv_bytes=1 * MiB, promote_s=0.1)
    manager = Manager(
        [model(name, slow) for name in "abc"],
        [(device, device.total_bytes)],
        dram_bytes=500 * MiB,
        runtime_dir=runtime_dir,
        command_for=lambda _: command(),
        settings=dataclasses.replace(QUICK, pressure_s=0.05, calm_s=0.5, host_reserve_bytes=100 * MiB),
        gauge=host.gauge(),
    )
    await manager.start()
    found = Running(manager)
    for name, times in (("a", 3), ("b", 1), ("c", 2)):
        for _ in range(times):
            await found.ask(name)
    await found.until(lambda: all(found.state(name)["image_ready"] for name in "abc"))
    yield found
    await manager.close(0.0)


def images(running: Running) -> str:
    return "".join(name for name in "abc" if running.state(name)["image_bytes"])


def kinds(running: Running) -> list[str]:
    return [event["kind"] for event in running.manager.snapshot()["events"]]


async def test_images_go_least_worth_first_and_return_when_it_eases(running: Running, host: Host) -> None:
    host.available_bytes = 180 * MiB
    await asyncio.sleep(0.3)
    assert images(running) == "abc", "between the marks nothing goes"
    host.available_bytes = 98 * MiB
    await running.until(lambda: "image dropped" in kinds(running))
    host.available_bytes = 190 * MiB
    state = running.manager.snapshot()
    assert state["dram"]["pressure"]["pressed"]
    told = [event for event in state["events"] if event["kind"] in ("pressure", "image dropped")]
    assert [event["kind"] for event in told][:1] == ["pressure"]
    assert "slower" in told[0]["reason"]
    assert "98.0 MiB of host memory are available" in told[1]["reason"]
    assert "req/s" in told[1]["reason"]
    assert told[1]["model"] == "b", "the one asked for least"
    assert state["books_wrong"] == []
    host.available_bytes = 10 * GiB
    await running.until(lambda: images(running) == "abc")
    state = running.manager.snapshot()
    assert state["dram"]["limit_bytes"] == 500 * MiB
    assert kinds(running).count("pressure") == 1
    assert "pressure eased" in kinds(running)
    for name in "abc":
        assert await running.ask(name) == f"{name} 1 2 3 "


async def test_work_that_stands_still_takes_images_too(running: Running, host: Host) -> None:
    host.psi.write_text(STALLED)
    await running.until(lambda: images(running) == "")
    for name in "abc":
        assert await running.ask(name) == f"{name} 1 2 3 "
    assert images(running) == "", "none is filled while it lasts"
    host.psi.write_text(QUIET)
    await running.until(lambda: images(running) == "abc")


async def test_a_host_that_says_nothing_is_no_pressure(running: Running, host: Host) -> None:
    host.psi.unlink()
    await asyncio.sleep(0.3)
    assert images(running) == "abc"
    assert running.manager.snapshot()["dram"]["pressure"]["full_avg10"] is None


async def test_an_image_that_is_being_filled_is_given_up(
    host: Host, device: SimulatedDevice, runtime_dir: Path
) -> None:
    async with filling(host, device, runtime_dir, hold_s=60.0) as running:
        assert await running.ask("a") == "a 1 2 3 "
        await running.until(lambda: running.state("a")["image_bytes"] > 0)
        pid = running.state("a")["pid"]
        host.available_bytes = 0
        await running.until(lambda: "image dropped" in kinds(running))
        assert running.state("a")["image_bytes"] == 0
        [dropped] = [event for event in running.manager.snapshot()["events"] if event["kind"] == "image dropped"]
        assert "host memory is short" in dropped["reason"]
        assert await running.ask("a") == "a 1 2 3 "
        assert running.state("a")["pid"] == pid
        state = running.manager.snapshot()
        assert (state["crashes"], state["books_wrong"], state["dram"]["image_bytes"]) == (0, [], 0)
        host.available_bytes = 10 * GiB
        await running.until(lambda: running.state("a")["image_bytes"] > 0)


async def test_a_promotion_that_waited_for_an_image_goes_on_from_the_source(
    host: Host, device: SimulatedDevice, runtime_dir: Path
) -> None:
    async with filling(host, device, runtime_dir, hold_s=0.0) as running:
        asking = asyncio.create_task(running.ask("a"))
        await running.until(lambda: running.state("a")["image_bytes"] > 0)
        await asyncio.sleep(0.2)
        assert running.state("a")["promotions"] == 0, "it waits for its image"
        host.available_bytes = 0
        assert await asking == "a 1 2 3 "
        a = running.state("a")
        assert (a["promotions"], a["image_bytes"], a["shown_as"]) == (1, 0, "device")


@contextlib.asynccontextmanager
async def filling(host: Host, device: SimulatedDevice, runtime_dir: Path, *, hold_s: float) -> AsyncIterator[Running]:
    """One model whose image takes longer than any test waits."""
    manager = Manager(
        [model("a", Knobs(weights_bytes=32 * MiB, kv_bytes=1 * MiB, image_s=300.0))],
        [(device, device.total_bytes)],
        dram_bytes=500 * MiB,
        runtime_dir=runtime_dir,
        command_for=lambda _: command(),
        settings=dataclasses.replace(QUICK, pressure_s=0.05, calm_s=0.2, host_reserve_bytes=100 * MiB, hold_s=hold_s),
        gauge=host.gauge(),
    )
    await manager.start()
    yield Running(manager)
    await manager.close(0.0)
