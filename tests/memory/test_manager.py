from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path

import psutil
import pytest

from mball.device.simulated import SimulatedDevice
from mball.errors import ConfigError, ModelDoesNotFit, QueueFull, QueueTimeout, TransitionError, UnknownModel
from mball.memory.manager import Manager
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Serve, model

SMALL = Knobs(weights_bytes=8 * MiB, kv_bytes=4 * MiB)


async def test_models_take_turns_on_a_device_with_room_for_one(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a"), model("b"))
    assert await running.ask("a") == "a 1 2 3 "
    assert running.state("a")["shown_as"] == "device"
    assert await running.ask("b") == "b 1 2 3 "
    assert running.state("a")["shown_as"] == "source"
    assert await running.ask("a") == "a 1 2 3 "
    assert running.manager.snapshot()["promotions"] == 3
    assert device.refusals == 0


async def test_models_that_fit_together_stay_together(serve: Serve) -> None:
    running = await serve(model("a"), model("small", SMALL))
    for _ in range(3):
        await asyncio.gather(running.ask("a"), running.ask("small"))
    state = running.manager.snapshot()
    assert state["promotions"] == 2
    assert state["demotions"] == 0
    assert {m["shown_as"] for m in state["models"]} == {"device"}


async def test_the_state_says_what_is_held_and_promised(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a"), model("b"))
    before = running.state("a")
    assert (before["process"], before["weights"], before["shown_as"]) == ("gone", "source", "stopped")
    await running.ask("a")
    state, a = running.manager.snapshot(), running.state("a")
    assert (a["process"], a["weights"], a["open"], a["in_flight"], a["queued"]) == ("alive", "device", True, 0, 0)
    assert a["device_bytes"] == a["promised_bytes"] == 81 * MiB
    assert a["baseline_bytes"] > 0
    assert a["last_swap_s"] > 0
    assert state["devices"] == [
        {
            "name": device.name,
            "total_bytes": 120 * MiB,
            "limit_bytes": 120 * MiB,
            "promised_bytes": 81 * MiB,
            "measured_bytes": 81 * MiB,
            "ballooned_bytes": 0,
            "foreign_bytes": 0,
            "lost": None,
        }
    ]
    assert (before["device"], a["device"]) == (None, device.name)
    assert device.process_bytes(a["pid"]) == 81 * MiB


async def test_a_sleeping_worker_is_charged_its_context(serve: Serve) -> None:
    running = await serve(model("a"), model("b"))
    await running.ask("a")
    await running.ask("b")
    a = running.state("a")
    assert (a["process"], a["promised_bytes"], a["device_bytes"]) == ("alive", 1 * MiB, 1 * MiB)


async def test_an_unknown_model_is_named(serve: Serve) -> None:
    running = await serve(model("a"))
    for attempt in (running.ask, running.manager.load, running.manager.unload, running.manager.pin):
        with pytest.raises(UnknownModel, match="'z' is not served here; these are: a"):
            await attempt("z")


async def test_two_models_of_one_name_are_refused(device: SimulatedDevice, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Manager(
            [model("a"), model("a")],
            [(device, 1)],
            dram_bytes=0,
            runtime_dir=tmp_path,
            command_for=lambda spec: [],
        )


async def test_a_model_larger_than_the_budget_is_refused_with_the_numbers(serve: Serve) -> None:
    running = await serve(model("huge", Knobs(weights_bytes=150 * MiB)), model("a"))
    with pytest.raises(ModelDoesNotFit, match=r"needs 167 MiB \(weights 150 MiB, KV 16\.0 MiB.* 120 MiB in all"):
        await running.ask("huge")
    began = asyncio.get_running_loop().time()
    with pytest.raises(ModelDoesNotFit):
        await running.ask("huge")
    assert asyncio.get_running_loop().time() - began < 0.2
    state = running.state("huge")
    assert (state["shown_as"], state["pid"], state["promised_bytes"]) == ("failed", None, 0)
    assert await running.ask("a") == "a 1 2 3 "


async def test_the_budget_binds_below_what_the_device_has(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a", SMALL), model("b", SMALL), device_bytes=20 * MiB)
    for name in "abab":
        await running.ask(name)
    assert running.manager.snapshot()["promotions"] == 4
    assert device.peak_bytes <= 20 * MiB


async def test_a_pinned_model_stays_and_what_has_no_room_beside_it_is_told(serve: Serve) -> None:
    running = await serve(model("a"), model("b"))
    await running.ask("a")
    await running.manager.pin("a")
    with pytest.raises(ModelDoesNotFit, match="beside pinned a: unpin one"):
        await running.ask("b")
    assert running.state("a")["shown_as"] == "device"
    assert running.state("a")["pinned"]
    await running.manager.unpin("a")
    assert await running.ask("b") == "b 1 2 3 "


async def test_load_and_unload_by_hand(serve: Serve) -> None:
    running = await serve(model("a"), model("b"))
    await running.manager.load("a")
    assert running.state("a")["shown_as"] == "device"
    assert running.state("a")["rate"] == 0.0
    await running.manager.load("a")
    await running.manager.unload("a")
    assert running.state("a")["shown_as"] == "source"
    await running.manager.unload("a")
    await running.manager.unload("b")
    assert await running.ask("a") == "a 1 2 3 "


async def test_unload_waits_for_those_inside_and_brings_back_for_those_behind(serve: Serve) -> None:
    running = await serve(model("a", Knobs(token_s=0.1)))
    await running.manager.load("a")
    inside = asyncio.create_task(running.ask("a"))
    await running.until(lambda: running.state("a")["in_flight"] == 1)
    unloading = asyncio.create_task(running.manager.unload("a"))
    await running.until(lambda: not running.state("a")["open"])
    behind = asyncio.create_task(running.ask("a"))
    await asyncio.gather(inside, unloading, behind)
    assert running.state("a")["promotions"] == 2


async def test_unload_gives_up_and_opens_again(serve: Serve) -> None:
    running = await serve(model("a"), settings=dataclasses.replace(QUICK, drain_s=0.1, demote_s=0.1))
    async with running.manager.admit("a"):
        with pytest.raises(TransitionError, match="still in use"):
            await running.manager.unload("a")
        assert await running.ask("a") == "a 1 2 3 "


async def test_preloading_fills_free_room_and_takes_no_others(serve: Serve) -> None:
    running = await serve(model("a", preload=True), model("b", preload=True), model("small", SMALL, preload=True))
    await running.until(lambda: running.manager.snapshot()["promotions"] == 2)
    await running.until(lambda: all(running.state(name)["process"] == "alive" for name in "ab"))
    await asyncio.sleep(0.2)
    shown = {name: running.state(name)["shown_as"] for name in ("a", "b", "small")}
    assert shown.pop("small") == "device"
    assert sorted(shown.values()) == ["device", "source"]


async def test_a_model_that_is_not_used_is_demoted_after_its_time(serve: Serve) -> None:
    running = await serve(model("a", keep_alive_s=0.2), model("b", SMALL, keep_alive_s=0.2, pinned=True))
    await asyncio.gather(running.ask("a"), running.ask("b"))
    await running.until(lambda: running.state("a")["shown_as"] == "source")
    assert running.state("b")["shown_as"] == "device"
    assert await running.ask("a") == "a 1 2 3 "


async def test_one_that_waits_too_long_is_told_and_leaves_no_gate_shut(serve: Serve) -> None:
    running = await serve(model("a"), model("b"))
    async with running.manager.admit("a"):
        with pytest.raises(QueueTimeout):
            await running.ask("b", deadline_s=0.5)
        await running.until(lambda: bool(running.state("a")["open"]))
        assert await running.ask("a") == "a 1 2 3 "
    assert running.state("b")["queued"] == 0


async def test_a_queue_that_is_full_refuses_but_not_for_a_model_that_is_there(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, max_queue=3, min_stay_s=60.0, max_stay_s=60.0, max_wait_s=3.0)
    running = await serve(model("a", max_in_flight=1), model("b"), settings=settings)
    async with running.manager.admit("a"):
        waiting = [asyncio.create_task(running.ask("b")) for _ in range(3)]
        await running.until(lambda: running.state("b")["queued"] == 3)
        for name in ("b", "a"):
            with pytest.raises(QueueFull) as full:
                await running.ask(name)
            assert full.value.retry_after_s is not None
            assert full.value.retry_after_s >= 1
    assert await running.ask("a") == "a 1 2 3 "
    assert await asyncio.gather(*waiting) == ["b 1 2 3 "] * 3


async def test_a_cancelled_wait_is_forgotten(serve: Serve) -> None:
    running = await serve(model("a"), model("b"))
    async with running.manager.admit("a"):
        waiting = asyncio.create_task(running.ask("b"))
        await running.until(lambda: running.state("b")["queued"] == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert running.state("b")["queued"] == 0
        assert await running.ask("a") == "a 1 2 3 "


async def test_a_worker_has_its_own_group_a_small_environment_and_a_private_folder(
    serve: Serve, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "do not hand on")
    running = await serve(model("a"))
    await running.ask("a")
    pid = running.state("a")["pid"]
    assert os.getpgid(pid) == pid
    names = set(psutil.Process(pid).environ())
    assert "SECRET_KEY" not in names
    assert {"PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "MALLOC_ARENA_MAX", "CUDA_VISIBLE_DEVICES"} <= names
    mode, log = await asyncio.to_thread(
        lambda: (runtime_dir.stat().st_mode, (runtime_dir / "logs" / "a.log").read_text())
    )
    assert mode & 0o777 == 0o700
    assert log == "fake worker a, started\n"


async def test_a_stopped_worker_makes_room_where_sleeping_ones_fill_the_device(serve: Serve, tmp_path: Path) -> None:
    tight = SimulatedDevice.create(tmp_path / "tight", 100 * MiB, context_bytes=15 * MiB)
    running = await serve(model("a"), model("b"), model("c"), on=tight)
    for name in "abcab":
        assert await running.ask(name) == f"{name} 1 2 3 "
    assert tight.refusals == 0
    assert running.manager.snapshot()["crashes"] == 0
    assert sum(m["starts"] for m in running.manager.snapshot()["models"]) == 5


async def test_starts_do_not_hold_up_switches(serve: Serve) -> None:
    running = await serve(model("slow", Knobs(weights_bytes=MiB, kv_bytes=0, start_s=3.0)), model("a"), model("b"))
    await asyncio.gather(running.ask("a"))
    slow = asyncio.create_task(running.ask("slow"))
    await running.until(lambda: running.state("slow")["process"] == "starting")
    for name in "baba":
        await running.ask(name)
    assert running.state("slow")["process"] == "starting"
    assert await slow == "slow 1 2 3 "


async def test_a_loaded_model_answers_while_another_loads(serve: Serve) -> None:
    running = await serve(model("a", SMALL), model("slow", Knobs(promote_s=2.0)))
    await asyncio.gather(running.ask("a"), running.manager.unload("slow"))
    slow = asyncio.create_task(running.ask("slow"))
    await running.until(lambda: running.state("slow")["promised_bytes"] > 2 * MiB)
    for _ in range(5):
        assert await running.ask("a", deadline_s=1.0) == "a 1 2 3 "
    assert not slow.done()
    await slow
