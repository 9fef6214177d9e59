"""The balloon, as the manager works it: by hand, for others, and out again."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from mball.device.simulated import SimulatedDevice
from mball.errors import DeviceOutOfMemory, InvalidRequest, ModelDoesNotFit
from mball.memory.model import Model
from mball.memory.process import WorkerProcess
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Running, Serve, model, slot_of

SOFT = Knobs(weights_bytes=40 * MiB, kv_bytes=32 * MiB, balloons=True)
"""On the device 73 MiB, of which 28 can be given up."""


def books(running: Running, device: SimulatedDevice) -> None:
    state = running.manager.snapshot()
    assert state["books_wrong"] == []
    assert state["devices"][0]["promised_bytes"] >= state["devices"][0]["measured_bytes"]
    assert state["devices"][0]["promised_bytes"] <= device.total_bytes
    assert device.refusals == 0


async def test_by_hand_while_it_serves_and_back(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a", SOFT))
    await running.ask("a")
    await running.manager.balloon("a", 20 * MiB)
    a = running.state("a")
    assert (a["balloon_bytes"], a["ballooned_bytes"]) == (20 * MiB, 20 * MiB)
    assert a["device_bytes"] == a["promised_bytes"] == a["needed_bytes"] == 53 * MiB
    assert a["open"]
    assert await running.ask("a") == "a 1 2 3 "
    assert device.free_bytes() == device.total_bytes - 53 * MiB
    last = a["last_event"]
    assert (last["kind"], last["reason"], last["freed_bytes"]) == ("ballooned", "asked for by hand", 20 * MiB)
    books(running, device)
    await running.manager.balloon("a", 0)
    a = running.state("a")
    assert (a["ballooned_bytes"], a["promised_bytes"]) == (0, 73 * MiB)
    assert a["last_event"]["kind"] == "deflated"
    books(running, device)


async def test_what_its_operator_took_stays_taken(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a", SOFT), model("b", Knobs(kv_bytes=40 * MiB)))
    await running.ask("a")
    await running.manager.balloon("a", 16 * MiB)
    await running.ask("b")
    assert running.state("a")["shown_as"] != "device"
    assert running.state("a")["needed_bytes"] == 57 * MiB
    await running.ask("a")
    assert running.state("a")["ballooned_bytes"] == 16 * MiB
    assert running.state("a")["promised_bytes"] == 57 * MiB
    books(running, device)
    await running.manager.unload("a")
    await running.manager.balloon("a", 0)
    await running.ask("a")
    assert running.state("a")["promised_bytes"] == 73 * MiB
    books(running, device)


@pytest.mark.parametrize("nbytes", [-1, 32 * MiB, 30 * MiB])
async def test_more_than_it_can_do_without_is_refused(serve: Serve, device: SimulatedDevice, nbytes: int) -> None:
    running = await serve(model("a", SOFT))
    await running.ask("a")
    with pytest.raises(InvalidRequest, match="a"):
        await running.manager.balloon("a", nbytes)
    assert running.state("a")["balloon_bytes"] == 0
    assert running.state("a")["promised_bytes"] == 73 * MiB
    books(running, device)


async def test_an_engine_is_asked_before_anything_is_demoted_whole(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a", SOFT), model("b", Knobs(weights_bytes=50 * MiB, kv_bytes=6 * MiB)))
    await running.ask("a")
    assert running.state("a")["spare_bytes"] == 28 * MiB
    await running.ask("b")
    a, b = running.state("a"), running.state("b")
    assert a["shown_as"] == b["shown_as"] == "device"
    assert a["demotions"] == 0
    assert a["ballooned_bytes"] >= 73 + 57 - 120
    told = [event for event in running.manager.snapshot()["events"] if event["kind"] == "ballooned"]
    assert "for b: " in told[0]["reason"]
    assert "req/s" in told[0]["reason"]
    books(running, device)
    for name in "abab":
        assert await running.ask(name) == f"{name} 1 2 3 "
    assert running.manager.snapshot()["promotions"] == 2


async def test_it_is_let_out_where_there_is_room_again(serve: Serve, device: SimulatedDevice) -> None:
    settings = dataclasses.replace(QUICK, deflate_s=0.2)
    running = await serve(
        model("a", SOFT), model("b", Knobs(weights_bytes=50 * MiB, kv_bytes=6 * MiB)), settings=settings
    )
    await running.ask("a")
    await running.ask("b")
    assert running.state("a")["ballooned_bytes"] > 0
    await running.manager.unload("b")
    await running.until(lambda: running.state("a")["ballooned_bytes"] == 0)
    assert running.state("a")["promised_bytes"] == 73 * MiB
    assert running.state("a")["demotions"] == 0
    books(running, device)


DEEP = dataclasses.replace(SOFT, layer_bytes=30 * MiB, layer_s=0.01, promote_s=0.5)
WIDE = Knobs(weights_bytes=74 * MiB, kv_bytes=6 * MiB)
"""Needs 34 MiB that are not free beside a DEEP one, 6 more than nobody misses."""


async def test_layers_go_before_a_whole_model_where_that_costs_less_and_come_back(
    serve: Serve, device: SimulatedDevice
) -> None:
    settings = dataclasses.replace(QUICK, deflate_s=0.2)
    running = await serve(model("a", DEEP), model("b", WIDE), settings=settings)
    for _ in range(3):
        await running.ask("a")
    await running.until(lambda: running.state("a")["layer_bytes"] == 30 * MiB)
    await running.ask("b")
    a, b = running.state("a"), running.state("b")
    assert a["shown_as"] == b["shown_as"] == "device"
    assert a["demotions"] == 0
    assert a["ballooned_bytes"] == 34 * MiB
    told = [event for event in running.manager.snapshot()["events"] if event["kind"] == "ballooned"]
    assert "for b: " in told[0]["reason"]
    books(running, device)
    for name in "abab":
        assert await running.ask(name) == f"{name} 1 2 3 "
    assert running.manager.snapshot()["promotions"] == 2
    await running.manager.unload("b")
    await running.until(lambda: running.state("a")["ballooned_bytes"] == 0)
    assert running.state("a")["promised_bytes"] == 73 * MiB
    books(running, device)


async def test_a_whole_model_goes_where_streaming_it_would_cost_more(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a", dataclasses.replace(DEEP, layer_s=60.0)), model("b", WIDE))
    await running.ask("a")
    await running.until(lambda: running.state("a")["layer_bytes"] > 0)
    await running.ask("b")
    a = running.state("a")
    assert (a["demotions"], a["ballooned_bytes"]) == (1, 0)
    books(running, device)


async def test_layers_that_cannot_be_given_after_all_cost_nobody_his_place(
    serve: Serve, device: SimulatedDevice
) -> None:
    running = await serve(model("a", dataclasses.replace(DEEP, fail_at="balloon")), model("b", WIDE))
    await running.ask("a")
    await running.until(lambda: running.state("a")["layer_bytes"] > 0)
    assert await running.ask("b") == "b 1 2 3 "
    assert running.state("a")["demotions"] == 1
    books(running, device)


async def test_one_that_streams_comes_with_fewer_layers_where_what_is_pinned_leaves_less(
    serve: Serve, device: SimulatedDevice
) -> None:
    settings = dataclasses.replace(QUICK, deflate_s=0.2)
    deep = Knobs(weights_bytes=60 * MiB, kv_bytes=6 * MiB, layer_bytes=30 * MiB)
    running = await serve(model("a", pinned=True), model("b", deep), model("c", deep), settings=settings)
    await running.ask("a")
    room = device.total_bytes - running.state("a")["promised_bytes"]
    assert await running.ask("b") == "b 1 2 3 "
    b = running.state("b")
    assert b["ballooned_bytes"] == 67 * MiB - room > 0
    assert b["promised_bytes"] == room
    assert "pinned" not in (b["error"] or "")
    books(running, device)
    # It comes so again, and so does another one that takes its place.
    assert await running.ask("c") == "c 1 2 3 "
    assert await running.ask("b") == "b 1 2 3 "
    assert running.state("b")["ballooned_bytes"] == 67 * MiB - room
    await running.manager.unpin("a")
    await running.manager.unload("a")
    await running.until(lambda: running.state("b")["ballooned_bytes"] == 0)
    books(running, device)


async def test_room_that_is_too_little_for_a_layer_is_offered_once(serve: Serve, device: SimulatedDevice) -> None:
    settings = dataclasses.replace(QUICK, deflate_s=0.05)
    deep = Knobs(weights_bytes=60 * MiB, kv_bytes=6 * MiB, layer_bytes=30 * MiB, piece_bytes=15 * MiB)
    running = await serve(model("a", pinned=True), model("b", deep), settings=settings)
    await running.ask("a")
    assert await running.ask("b") == "b 1 2 3 "
    tried = slot_of(running.manager).sampler._too_little
    await running.until(lambda: 0 < tried.get("b", 0) < 15 * MiB)
    assert not [event for event in running.manager.snapshot()["events"] if event["kind"] == "deflated"]
    await running.manager.unpin("a")
    await running.manager.unload("a")
    await running.until(lambda: running.state("b")["ballooned_bytes"] == 0)
    books(running, device)


async def test_one_whose_layers_are_not_enough_is_told_who_has_the_room(serve: Serve, device: SimulatedDevice) -> None:
    deep = Knobs(weights_bytes=60 * MiB, kv_bytes=6 * MiB, layer_bytes=10 * MiB)
    running = await serve(model("a", pinned=True), model("b", deep))
    await running.ask("a")
    with pytest.raises(ModelDoesNotFit, match="beside pinned a"):
        await running.ask("b")
    assert running.state("b")["needed_bytes"] == 67 * MiB
    books(running, device)


async def test_what_its_operator_gives_back_comes_when_there_is_room(serve: Serve, device: SimulatedDevice) -> None:
    settings = dataclasses.replace(QUICK, deflate_s=0.1)
    running = await serve(
        model("a", SOFT), model("b", Knobs(weights_bytes=50 * MiB, kv_bytes=12 * MiB)), settings=settings
    )
    await running.ask("a")
    await running.manager.balloon("a", 26 * MiB)
    await running.ask("b")
    await running.manager.balloon("a", 0)
    assert running.state("a")["ballooned_bytes"] == 26 * MiB
    await running.until(lambda: 0 < running.state("a")["ballooned_bytes"] < 26 * MiB)
    await running.manager.unload("b")
    await running.until(lambda: running.state("a")["ballooned_bytes"] == 0)
    books(running, device)


async def test_an_engine_that_can_no_longer_give_costs_nobody_his_place(serve: Serve, device: SimulatedDevice) -> None:
    fails = dataclasses.replace(SOFT, fail_at="balloon")
    running = await serve(model("a", fails), model("b", Knobs(weights_bytes=50 * MiB, kv_bytes=6 * MiB)))
    await running.ask("a")
    assert await running.ask("b") == "b 1 2 3 "
    assert running.state("a")["demotions"] == 1
    assert running.state("b")["error"] is None
    books(running, device)


async def test_a_plan_that_came_to_nothing_leaves_no_door_shut(serve: Serve, device: SimulatedDevice) -> None:
    fails = dataclasses.replace(SOFT, fail_at="balloon", promote_s=0.3)
    # Slow enough to come back for the balloon to be the first move.
    small = Knobs(weights_bytes=28 * MiB, kv_bytes=1 * MiB, promote_s=0.1)
    running = await serve(
        model("a", fails), model("b", Knobs(weights_bytes=50 * MiB, kv_bytes=9 * MiB)), model("c", small)
    )
    for name in "aaaaac":
        await running.ask(name)
    assert await running.ask("b") == "b 1 2 3 "
    assert running.state("c")["demotions"] == 0, "the first plan was a's balloon and c, the second a alone"
    assert running.state("a")["demotions"] == 1
    assert await running.ask("c", deadline_s=5.0) == "c 1 2 3 "
    books(running, device)


async def test_what_the_device_does_not_show_free_is_not_promised_again(serve: Serve) -> None:
    liar = dataclasses.replace(SOFT, kept_bytes=1)
    settings = dataclasses.replace(QUICK, release_s=0.2, slack_bytes=0)
    running = await serve(model("a", liar), settings=settings)
    await running.ask("a")
    real = running.manager._models["a"]
    transitions = slot_of(running.manager).transitions
    assert transitions is not None
    with pytest.raises(DeviceOutOfMemory):
        await transitions.balloon(real, 8 * MiB, 10, "a test")
    assert slot_of(running.manager).ledger.held("a") == 73 * MiB
    assert real.spare_bytes == 0


async def test_a_worker_that_ends_while_it_is_ballooned_frees_all(serve: Serve, device: SimulatedDevice) -> None:
    dies = dataclasses.replace(SOFT, crash_at="balloon")
    running = await serve(model("a", dies))
    await running.ask("a")
    with pytest.raises(Exception, match="ended during balloon"):
        await running.manager.balloon("a", 8 * MiB)
    await running.until(lambda: running.state("a")["process"] == "gone")
    assert device.free_bytes() == device.total_bytes
    books(running, device)


async def test_balloons_and_requests_at_once(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a", dataclasses.replace(SOFT, token_s=0.001)), model("b", SOFT))
    done = asyncio.Event()

    async def squeeze() -> int:
        count = 0
        while not done.is_set():
            await running.manager.balloon("a", (count % 3) * 8 * MiB)
            count += 1
            await asyncio.sleep(0.002)
        return count

    squeezing = asyncio.create_task(squeeze())
    answers = await asyncio.gather(*(running.ask("ab"[number % 2]) for number in range(40)))
    done.set()
    assert await squeezing > 10
    assert answers == [f"{'ab'[number % 2]} 1 2 3 " for number in range(40)]
    books(running, device)


async def test_a_wish_that_comes_while_the_last_one_is_carried_out(
    serve: Serve, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await serve(model("a", SOFT))
    await running.ask("a")
    await running.manager.unload("a")
    await running.manager.balloon("a", 8 * MiB)
    transitions, squeezed = slot_of(running.manager).transitions, list[int]()
    squeeze = transitions._squeeze

    async def then_another(of: Model, worker: WorkerProcess, nbytes: int, epoch: int, **how: bool) -> None:
        await squeeze(of, worker, nbytes, epoch, **how)
        squeezed.append(nbytes)
        of.balloon_bytes = 0

    monkeypatch.setattr(transitions, "_squeeze", then_another)
    assert await running.ask("a") == "a 1 2 3 "
    assert squeezed == [8 * MiB]
    assert slot_of(running.manager).ledger.held("a") == device.process_bytes(running.state("a")["pid"])


async def test_one_that_hangs_at_its_balloon_is_ended_and_makes_room_all_the_same(
    serve: Serve, device: SimulatedDevice
) -> None:
    settings = dataclasses.replace(QUICK, demote_s=0.3, sample_s=0.05)
    hangs = dataclasses.replace(SOFT, hang_at="balloon")
    running = await serve(
        model("a", hangs), model("b", Knobs(weights_bytes=40 * MiB, kv_bytes=20 * MiB)), settings=settings
    )
    await running.ask("a")
    await running.until(lambda: running.state("a")["spare_bytes"] > 0)
    pid = running.state("a")["pid"]
    assert await running.ask("b") == "b 1 2 3 "
    assert running.state("b")["crashes"] == 0
    assert running.state("a")["pid"] != pid
    books(running, device)
