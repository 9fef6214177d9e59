from __future__ import annotations

import asyncio
import dataclasses
import time

from mball.device.simulated import SimulatedDevice
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Running, Serve, model


async def test_every_request_of_many_has_its_answer_and_the_device_is_never_over_committed(
    serve: Serve, device: SimulatedDevice
) -> None:
    names = ["a", "b", "c"]
    running = await serve(*(model(name, Knobs(token_s=0.001)) for name in names))
    over = asyncio.create_task(watch(device))
    free = asyncio.Semaphore(6)

    async def ask(number: int) -> str:
        async with free:
            return await running.ask(names[number % 3])

    answers = await asyncio.gather(*(ask(number) for number in range(120)))
    assert answers == [f"{names[number % 3]} 1 2 3 " for number in range(120)]
    over.cancel()
    state = running.manager.snapshot()
    assert state["promotions"] >= 20
    assert state["crashes"] == 0
    assert device.refusals == 0
    assert device.peak_bytes <= device.total_bytes


async def watch(device: SimulatedDevice) -> None:
    while True:
        held = await asyncio.to_thread(device.holders)
        assert sum(held.values()) <= device.total_bytes
        await asyncio.sleep(0.01)


async def busy(
    running: Running, name: str, until_s: float, waits: list[float], *, clients: int = 4, each_s: float = 0.02
) -> int:
    async def client() -> int:
        answered = 0
        while (began := time.monotonic()) < until_s:
            async with running.manager.admit(name):
                waits.append(time.monotonic() - began)
                await asyncio.sleep(each_s)
                answered += 1
        return answered

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


async def test_nobody_starves_and_switching_takes_its_share_of_time_and_no_more(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, max_wait_s=60.0, swap_time_share=0.25, swap_saved_s=0.0)
    running = await serve(*(model(name, Knobs(promote_s=0.1)) for name in "abc"), settings=settings)
    for name in "abc":
        await running.ask(name)
    began = time.monotonic()
    before = running.manager.snapshot()["promotions"]
    waits: dict[str, list[float]] = {name: [] for name in "abc"}
    answered = await asyncio.gather(*(busy(running, name, began + 6.0, waits[name]) for name in "abc"))
    took = time.monotonic() - began
    promotions = running.manager.snapshot()["promotions"] - before
    assert min(answered) > 0
    assert promotions >= 3
    # A swap of 0.1 s and a share of a quarter: a stay of at least 0.3 s, a swap every 0.4 s at the most.
    assert promotions <= took / 0.4 + 1
    assert max(max(times) for times in waits.values()) < took


async def test_a_request_that_waited_long_enough_ends_a_stay(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, max_wait_s=0.5, min_stay_s=1000.0, max_stay_s=1000.0)
    running = await serve(model("a"), model("b"), settings=settings)
    await running.ask("a")
    waits: list[float] = []
    load = asyncio.create_task(busy(running, "a", time.monotonic() + 3.0, waits))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    await running.ask("b")
    waited = time.monotonic() - began
    assert waited >= 0.5
    assert not load.done()
    assert await load > 0


async def test_inside_its_stay_a_model_is_left_alone(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, max_wait_s=60.0, min_stay_s=1.0, swap_saved_s=0.0)
    running = await serve(model("a"), model("b"), settings=settings)
    await running.ask("a")
    opened = time.monotonic()
    await running.ask("b")
    assert time.monotonic() - opened >= 0.9


async def test_an_idle_model_leaves_at_once_while_switching_is_rare(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, max_wait_s=3.0, min_stay_s=1000.0, max_stay_s=1000.0, swap_saved_s=2.2)
    settings = dataclasses.replace(settings, swap_time_share=0.001)
    running = await serve(*(model(name, Knobs(promote_s=0.6)) for name in "ab"), settings=settings)
    took = []
    for name in "abababab":
        began = time.monotonic()
        await running.ask(name)
        took.append(time.monotonic() - began)
    # Starts come first. Then what is saved up lets some switches happen at once, and those after it wait their turn.
    assert min(took[2:]) < 2.0
    assert max(took[2:]) >= 2.9


async def test_the_oldest_waiter_is_served_first(serve: Serve) -> None:
    running = await serve(*(model(name) for name in "abcd"))
    for name in "abcd":
        await running.ask(name)
    served: list[str] = []

    async def ask(name: str) -> None:
        async with running.manager.admit(name):
            served.append(name)

    async with running.manager.admit("d"):
        waiting = []
        for name in "bcab":
            waiting.append(asyncio.create_task(ask(name)))
            await asyncio.sleep(0.02)
    await asyncio.gather(*waiting)
    assert served == ["b", "b", "c", "a"]


async def test_a_small_model_goes_ahead_of_a_large_one_that_has_to_wait_anyway(serve: Serve) -> None:
    small = Knobs(weights_bytes=8 * MiB, kv_bytes=4 * MiB)
    running = await serve(model("a"), model("b"), model("small", small))
    for name in ("small", "b", "a"):
        await running.ask(name)
    await running.manager.unload("small")
    async with running.manager.admit("a"):
        large = asyncio.create_task(running.ask("b"))
        await running.until(lambda: not running.state("a")["open"])
        assert await running.ask("small", deadline_s=10.0) == "small 1 2 3 "
        assert not large.done()
    await large


async def test_a_large_model_that_needs_the_room_of_two_busy_ones_gets_it(serve: Serve) -> None:
    half = Knobs(weights_bytes=40 * MiB, kv_bytes=4 * MiB)
    settings = dataclasses.replace(QUICK, max_wait_s=0.2)
    running = await serve(
        model("a", half), model("b", half), model("large", Knobs(weights_bytes=90 * MiB)), settings=settings
    )
    await running.ask("large")
    until_s = time.monotonic() + 6.0
    load = [asyncio.create_task(busy(running, name, until_s, [], clients=6, each_s=0.4)) for name in "ab"]
    await running.until(lambda: all(running.state(name)["weights"] == "device" for name in "ab"))
    assert await running.ask("large", deadline_s=3.0) == "large 1 2 3 "
    assert not any(task.done() for task in load)
    assert min(await asyncio.gather(*load)) > 0


async def test_a_model_in_use_is_never_demoted(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, max_wait_s=0.05, drain_s=0.3)
    running = await serve(model("a"), model("b"), settings=settings)
    async with running.manager.admit("a"):
        waiting = asyncio.create_task(running.ask("b"))
        for _ in range(20):
            await asyncio.sleep(0.05)
            assert running.state("a")["weights"] == "device"
            assert running.state("a")["device_bytes"] == 81 * MiB
        # The drain is given up after its deadline: the door opens for a moment.
        assert not waiting.done()
        assert await running.ask("a", deadline_s=5.0) == "a 1 2 3 "
    assert await waiting == "b 1 2 3 "
