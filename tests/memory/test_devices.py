"""Several devices: each serves for itself, and a model goes where its coming costs the others least."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.device.device import Device
from mball.device.simulated import SimulatedDevice
from mball.errors import ConfigError, DeviceInUse, ModelDoesNotFit, ModelFailed
from mball.memory.devices import Devices
from mball.memory.estimate import Estimate
from mball.memory.events import Events
from mball.memory.images import Images
from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.nursery import Nursery
from mball.memory.settings import Settings
from mball.memory.slot import Slot
from mball.memory.swap_broker import SwapBroker
from mball.memory.swap_images import SwapImages
from mball.memory.swap_keeper import SwapKeeper
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import Running, Serve, model

SMALL = Knobs(weights_bytes=8 * MiB, kv_bytes=4 * MiB)
FOLDER = Path("/run")


@pytest.fixture
def gpus(tmp_path: Path) -> list[SimulatedDevice]:
    """Two, each with room for one model of the default knobs (80 MiB) and a bit."""
    return [SimulatedDevice.create(tmp_path / f"gpu{n}", 120 * MiB, context_bytes=MiB) for n in range(2)]


def where(running: Running, *names: str) -> list[str]:
    """The devices of models, by the ends of their paths."""
    return [str(running.state(name)["device"]).rpartition("/")[2] for name in names]


def kinds(running: Running) -> list[str]:
    return [event["kind"] for event in running.manager.snapshot()["events"]]


async def test_two_models_serve_at_once_one_on_each(serve: Serve, gpus: list[SimulatedDevice]) -> None:
    running = await serve(model("a"), model("b"), on=gpus)
    for _ in range(3):
        assert await asyncio.gather(*map(running.ask, "ab")) == ["a 1 2 3 ", "b 1 2 3 "]
    state = running.manager.snapshot()
    assert set(where(running, "a", "b")) == {"gpu0", "gpu1"}
    assert [device["promised_bytes"] for device in state["devices"]] == [81 * MiB] * 2
    assert [device["measured_bytes"] for device in state["devices"]] == [81 * MiB] * 2
    assert (state["promotions"], state["demotions"], state["books_wrong"]) == (2, 0, [])
    assert kinds(running).count("placed") == 2
    for device, name in zip(gpus, sorted("ab", key=lambda name: where(running, name)), strict=True):
        assert device.process_bytes(running.state(name)["pid"]) == 81 * MiB


async def test_more_models_than_devices_take_turns_and_none_is_lost(serve: Serve, gpus: list[SimulatedDevice]) -> None:
    running = await serve(*(model(name) for name in "abcde"), on=gpus)
    answers = await asyncio.gather(*(running.ask(name) for name in "abcde" * 3))
    assert answers == [f"{name} 1 2 3 " for name in "abcde" * 3]
    state = running.manager.snapshot()
    assert state["books_wrong"] == []
    assert state["crashes"] == 0
    assert [device.refusals for device in gpus] == [0, 0]
    assert all(device["promised_bytes"] > 0 for device in state["devices"])


async def test_a_switch_waits_for_none_on_another_device(serve: Serve, gpus: list[SimulatedDevice]) -> None:
    here, there = (device.name for device in gpus)
    running = await serve(
        model("hangs", Knobs(hang_at="promote"), devices=(here,)),
        model("a", devices=(there,)),
        model("b", devices=(there,)),
        on=gpus,
    )
    hanging = asyncio.create_task(running.ask("hangs", deadline_s=60.0))
    await running.until(lambda: "promote" in [doing for _, doing in running.manager.workers().values()])
    for name in "abab":
        assert await running.ask(name) == f"{name} 1 2 3 "
    assert ("hangs", "promote") in running.manager.workers().values(), "all that was beside it"
    hanging.cancel()
    await asyncio.wait([hanging])


async def test_a_model_that_is_to_stay_on_a_device_stays_there(serve: Serve, gpus: list[SimulatedDevice]) -> None:
    running = await serve(*(model(name, devices=(gpus[1].name,)) for name in "ab"), on=gpus)
    for name in "abab":
        await running.ask(name)
        assert where(running, name) == ["gpu1"]
    assert running.manager.snapshot()["promotions"] == 4
    assert gpus[0].peak_bytes == 0


async def test_a_model_whose_device_is_not_there_is_refused(serve: Serve, gpus: list[SimulatedDevice]) -> None:
    with pytest.raises(ConfigError, match="a: its device is cuda:7, and those here are simulated:"):
        await serve(model("a", devices=("cuda:7",)), on=gpus)
    with pytest.raises(ConfigError, match="name each once"):
        await serve(model("a"), on=[gpus[0], gpus[0]])


async def test_one_device_that_is_taken_frees_the_others(
    serve: Serve, gpus: list[SimulatedDevice], tmp_path: Path
) -> None:
    third = SimulatedDevice.create(tmp_path / "gpu2", 120 * MiB)
    await serve(model("a"), on=[gpus[1]])
    with pytest.raises(DeviceInUse, match="gpu1"):
        await serve(model("a"), on=[gpus[0], gpus[1]])
    await serve(model("a"), on=[gpus[0], third])


async def test_a_worker_that_sleeps_on_a_full_device_makes_way_for_a_start_elsewhere(
    serve: Serve, gpus: list[SimulatedDevice]
) -> None:
    here, there = (device.name for device in gpus)
    running = await serve(model("a", devices=(here,)), model("b"), model("x", devices=(there,)), on=gpus)
    for name in "xba":
        await running.ask(name)
    assert where(running, "a", "b") == ["gpu0", "gpu0"]
    assert running.state("b")["process"] == "alive"
    await running.manager.pin("a")
    await running.manager.unload("x")
    assert await running.ask("b") == "b 1 2 3 "
    assert where(running, "a", "b") == ["gpu0", "gpu1"]
    assert running.state("a")["demotions"] == 0


async def test_a_worker_that_sleeps_is_woken_where_that_costs_less(serve: Serve, gpus: list[SimulatedDevice]) -> None:
    here, there = (device.name for device in gpus)
    running = await serve(model("a", devices=(here,)), model("b"), model("x", devices=(there,)), on=gpus)
    for name in "xba":
        await running.ask(name)
    await running.manager.unload("x")
    await running.ask("b")
    assert where(running, "b") == ["gpu0"], "a comes back faster than b starts"
    assert running.state("b")["starts"] == 1


async def test_one_that_turns_out_too_large_for_its_device_goes_to_a_larger(serve: Serve, tmp_path: Path) -> None:
    small = SimulatedDevice.create(tmp_path / "small", 100 * MiB, context_bytes=MiB)
    large = SimulatedDevice.create(tmp_path / "large", 200 * MiB, context_bytes=MiB)
    running = await serve(
        model("first", Knobs(weights_bytes=110 * MiB), devices=(large.name,)),
        model("big", Knobs(weights_bytes=100 * MiB)),
        model("huge", Knobs(weights_bytes=300 * MiB)),
        on=[small, large],
    )
    await running.ask("first")
    assert await running.ask("big") == "big 1 2 3 "
    assert where(running, "big") == ["large"]
    assert running.state("big")["starts"] == 2
    with pytest.raises(ModelDoesNotFit, match=r"needs 317 MiB .* 200 MiB in all"):
        await running.ask("huge")


async def test_a_device_that_is_lost_is_named_and_the_other_goes_on(
    serve: Serve, gpus: list[SimulatedDevice], tmp_path: Path
) -> None:
    running = await serve(model("a", devices=(gpus[0].name,)), model("b"), on=gpus)
    await running.until(lambda: not running.manager.not_ready())
    (tmp_path / "gpu0").rename(tmp_path / "away")
    await running.until(lambda: bool(running.manager.snapshot()["devices"][0]["lost"]))
    with pytest.raises(ModelFailed, match=r"a: its device does not answer: simulated:.*gpu0: no such device") as failed:
        await running.ask("a")
    assert failed.value.retry_after_s
    assert await running.ask("b") == "b 1 2 3 "
    assert where(running, "b") == ["gpu1"]
    assert running.manager.not_ready() is None
    assert kinds(running).count("device lost") == 1
    (tmp_path / "away").rename(tmp_path / "gpu0")
    await running.until(lambda: "device back" in kinds(running))
    assert await running.ask("a") == "a 1 2 3 "


async def test_without_any_device_nothing_is_ready(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a"))
    device.path.unlink()
    await running.until(lambda: running.manager.not_ready() == "no device answers")


class Room:
    """A device of which only the size matters."""

    context_bytes = 1

    def __init__(self, name: str, total_bytes: int) -> None:
        self.name = name
        self.total_bytes = total_bytes


def fleet(sizes: list[int], needs: list[tuple[int, int | None]]) -> tuple[Devices, list[Slot], list[Model]]:
    """Devices of these sizes, and models by weights and the one device that they may go to. Nothing runs."""
    rules, events = Settings(working_bytes=0), Events()
    models = [
        Model(model(f"m{n}", devices=() if only is None else (f"d{only}",)), rules, n, lambda: None, lambda: None)
        for n, (_, only) in enumerate(needs)
    ]
    for found, (nbytes, _) in zip(models, needs, strict=True):
        found.estimate = Estimate(nbytes, 0)
        found.spec = dataclasses.replace(found.spec, working_bytes=0)
    by_name = {m.name: m for m in models}
    devices = Devices(by_name, rules, events)
    keeper = SwapKeeper(None, events)
    images = Images(Ledger("dram", 0), rules, events, lambda: None, SwapImages(keeper, rules, events))
    nursery = Nursery({}, rules, None, FOLDER)
    swap = SwapBroker(keeper, rules.verb_s)
    slots = [
        Slot(_device(n, size), size, devices, images, rules, events, FOLDER, FOLDER, lambda _: [], nursery, swap)
        for n, size in enumerate(sizes)
    ]
    devices.settle(slots)
    return devices, slots, models


def _device(number: int, size: int) -> Device:
    found: Device = Room(f"d{number}", size)  # type: ignore[assignment]
    return found


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.integers(20, 120), min_size=2, max_size=4))
def test_where_there_is_room_a_model_goes_and_fits_as_tightly_as_it_can(data: st.DataObject, sizes: list[int]) -> None:
    only = st.one_of(st.none(), st.integers(0, len(sizes) - 1))
    needs = data.draw(st.lists(st.tuples(st.integers(1, 100), only), min_size=1, max_size=8))
    devices, slots, models = fleet(sizes, needs)
    left = {slot.name: slot.ledger.total_bytes for slot in slots}
    for found in models:
        found.wanted = True
        before = {m.name: devices.of(m).name for m in models if m.wanted and m is not found}
        roomy_before = {name for name, home in before.items() if left[home] >= 0}
        devices.gather(1.0)
        assert sorted(name for slot in slots for name in slot.models) == sorted(m.name for m in models)
        assert all(devices.of(models_by(models, name)).name == before[name] for name in roomy_before)
        left = {slot.name: slot.ledger.total_bytes for slot in slots}
        for m in models:
            if m.wanted and m is not found:
                left[devices.of(m).name] -= m.needed_bytes
        home, allowed = devices.of(found), devices.allowed(found)
        assert home in allowed
        nbytes = found.needed_bytes + 1  # its context
        roomy = [slot.name for slot in allowed if left[slot.name] >= nbytes]
        if roomy:
            assert left[home.name] == min(left[name] for name in roomy)
        elif any(found.needed_bytes <= slot.ledger.total_bytes for slot in allowed):
            assert found.needed_bytes <= home.ledger.total_bytes
        left[home.name] -= found.needed_bytes


def models_by(models: list[Model], name: str) -> Model:
    return next(m for m in models if m.name == name)
