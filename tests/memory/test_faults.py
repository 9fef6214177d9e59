"""Whatever a worker does, each request has one outcome, the others go on, and the budget holds."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from pathlib import Path

import aiohttp
import psutil
import pytest

from mball.device.proc import start_ticks
from mball.device.simulated import SimulatedDevice
from mball.errors import MballError, ModelFailed, NotReleased
from mball.memory.model import Model
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Running, Serve, model, post, slot_of

SMALL = Knobs(weights_bytes=8 * MiB, kv_bytes=4 * MiB)
HASTY = dataclasses.replace(QUICK, start_s=2.0, promote_s=1.0, demote_s=1.0, canary_s=1.0, release_s=0.5, verb_s=0.3)


def once(tmp_path: Path, **knobs: object) -> Knobs:
    return Knobs(times=1, counter=str(tmp_path / "counter"), **knobs)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def outcomes(running: Running, name: str, count: int) -> list[str | BaseException]:
    return await asyncio.gather(*(running.ask(name) for _ in range(count)), return_exceptions=True)


@pytest.mark.parametrize("step", ["start", "promote", "canary"])
async def test_a_worker_killed_on_its_way_in_is_started_again(
    serve: Serve, tmp_path: Path, device: SimulatedDevice, step: str
) -> None:
    running = await serve(model("a", once(tmp_path, crash_at=step)), model("b"))
    await running.ask("b")
    assert await outcomes(running, "a", 5) == ["a 1 2 3 "] * 5
    assert running.state("a")["crashes"] == 1
    assert await running.ask("b") == "b 1 2 3 "
    assert device.refusals == 0


async def test_a_worker_killed_on_its_way_out_makes_room_all_the_same(
    serve: Serve, tmp_path: Path, device: SimulatedDevice
) -> None:
    running = await serve(model("a", once(tmp_path, crash_at="demote")), model("b"))
    await running.ask("a")
    assert await running.ask("b") == "b 1 2 3 "
    assert running.state("a")["shown_as"] == "stopped"
    assert await running.ask("a") == "a 1 2 3 "
    assert device.refusals == 0


@pytest.mark.parametrize("step", ["start", "promote", "canary"])
async def test_a_worker_that_always_dies_fails_with_its_last_lines_and_the_others_go_on(
    serve: Serve, step: str
) -> None:
    running = await serve(model("a", Knobs(crash_at=step)), model("b"))
    results = await outcomes(running, "a", 4)
    assert all(isinstance(result, ModelFailed) for result in results), results
    assert "3 failures in a row" in str(results[0])
    assert "fake worker a" in str(results[0])
    assert "code -9" in str(results[0])
    assert running.state("a")["shown_as"] == "failed"
    assert running.state("a")["starts"] == 3
    assert running.state("a")["promised_bytes"] == 0
    assert await running.ask("b") == "b 1 2 3 "


async def test_a_failed_model_says_when_to_come_back_and_then_is_tried_again(serve: Serve, tmp_path: Path) -> None:
    knobs = Knobs(crash_at="start", times=3, counter=str(tmp_path / "counter"))
    running = await serve(model("a", knobs))
    with pytest.raises(ModelFailed) as failed:
        await running.ask("a")
    with pytest.raises(ModelFailed):
        await running.ask("a")
    assert running.state("a")["starts"] == 3
    assert failed.value.retry_after_s is not None
    await asyncio.sleep(QUICK.cool_down_s)
    assert await running.ask("a") == "a 1 2 3 "
    assert running.state("a")["error"] is None


async def test_a_worker_that_says_why_it_cannot_start_is_not_tried_again_and_again(serve: Serve) -> None:
    running = await serve(model("a", Knobs(cannot_start="no safetensors in /models/a")), model("b"))
    with pytest.raises(ModelFailed, match="no safetensors in /models/a"):
        await running.ask("a")
    assert running.state("a")["starts"] == 1
    assert await running.ask("b") == "b 1 2 3 "


async def test_a_command_that_is_not_there(serve: Serve) -> None:
    running = await serve(model("a"), command_for=lambda spec: ["/no/such/worker"])
    with pytest.raises(ModelFailed, match="/no/such/worker"):
        await running.ask("a")


async def test_a_model_that_cannot_be_loaded_gives_its_reason_and_the_others_go_on(
    serve: Serve, device: SimulatedDevice
) -> None:
    broken = Knobs(fail_at="promote", fail_with="model-2.safetensors: 3 bytes short")
    running = await serve(model("a", broken), model("b"))
    await running.ask("b")
    results = await outcomes(running, "a", 3)
    assert all("model-2.safetensors: 3 bytes short" in str(result) for result in results), results
    assert {type(result) for result in results} == {ModelFailed}
    assert running.state("a")["promised_bytes"] == 0
    assert await running.ask("b") == "b 1 2 3 "
    assert device.refusals == 0


async def test_memory_taken_by_others_is_the_models_failure_alone(serve: Serve, device: SimulatedDevice) -> None:
    unseen = dataclasses.replace(QUICK, foreign_s=60.0)
    running = await serve(model("a"), model("small", SMALL), settings=unseen)
    await running.ask("small")
    device.take(os.getpid(), 60 * MiB)
    with pytest.raises(ModelFailed, match="DeviceOutOfMemory"):
        await running.ask("a")
    assert await running.ask("small") == "small 1 2 3 "
    device.give(os.getpid(), 60 * MiB)
    await asyncio.sleep(QUICK.cool_down_s)
    assert await running.ask("a") == "a 1 2 3 "


@pytest.mark.parametrize("step", ["start", "promote", "canary"])
async def test_a_hung_worker_is_ended_at_its_deadline(serve: Serve, tmp_path: Path, step: str) -> None:
    running = await serve(model("a", once(tmp_path, hang_at=step)), model("b"), settings=HASTY)
    assert await running.ask("a") == "a 1 2 3 "
    assert running.state("a")["crashes"] == 1
    assert await running.ask("b") == "b 1 2 3 "


@pytest.mark.parametrize("step", ["promote", "canary"])
async def test_one_that_always_hangs_fails_with_the_reason(serve: Serve, step: str) -> None:
    hasty = dataclasses.replace(HASTY, promote_s=0.3, canary_s=0.3)
    running = await serve(model("a", Knobs(hang_at=step)), model("b"), settings=hasty)
    with pytest.raises(ModelFailed, match=f"3 failures in a row, the last: a: no answer to {step} within 0.3 s"):
        await running.ask("a")
    assert running.state("a")["promised_bytes"] == 0
    assert await running.ask("b") == "b 1 2 3 "


async def test_a_victim_s_failure_is_not_that_of_the_model_that_comes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await serve(model("a"), model("b"))
    await running.ask("a")
    transitions, refused = slot_of(running.manager).transitions, list[str]()
    demote = transitions.demote

    async def once_refused(victim: Model, epoch: int, reason: str) -> None:
        if not refused:
            refused.append(victim.name)
            raise NotReleased(f"{victim.name}: not yet")
        await demote(victim, epoch, reason)

    monkeypatch.setattr(transitions, "demote", once_refused)
    assert await running.ask("b") == "b 1 2 3 "
    assert refused == ["a"]
    assert running.state("b")["crashes"] == 0


async def test_one_that_hangs_on_its_way_out_is_stopped(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a", Knobs(hang_at="demote")), model("b"), settings=HASTY)
    await running.ask("a")
    pid = running.state("a")["pid"]
    assert await running.ask("b") == "b 1 2 3 "
    assert not alive(pid)
    assert device.refusals == 0


async def test_one_that_lies_about_its_release_is_stopped_before_its_bytes_are_promised_again(
    serve: Serve, device: SimulatedDevice
) -> None:
    running = await serve(model("liar", Knobs(kept_bytes=40 * MiB)), model("b"), settings=HASTY)
    await running.ask("liar")
    pid = running.state("liar")["pid"]
    assert await running.ask("b") == "b 1 2 3 "
    assert not alive(pid)
    assert running.state("liar")["shown_as"] == "stopped"
    last = running.manager.events.last("liar")
    assert last is not None
    assert last.kind == "stopped"
    assert "did not give its memory back: liar: its worker still holds" in last.reason
    assert device.refusals == 0


async def test_what_is_kept_within_the_slack_is_charged(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a", Knobs(kept_bytes=5 * MiB)), model("b"))
    await running.ask("a")
    await running.ask("b")
    assert running.state("a")["shown_as"] == "source"
    assert running.state("a")["promised_bytes"] == 6 * MiB
    for name in "ab":
        await running.ask(name)
    assert device.refusals == 0


async def test_what_its_context_has_grown_by_is_charged_and_no_reason_to_stop_it(
    serve: Serve, device: SimulatedDevice
) -> None:
    running = await serve(model("a", Knobs(extra_bytes=20 * MiB, kept_bytes=20 * MiB)), model("b", SMALL))
    await running.ask("a")
    pid = running.state("a")["pid"]
    await running.manager.unload("a")
    assert alive(pid)
    assert running.state("a")["promised_bytes"] == 21 * MiB
    for name in "ba":
        await running.ask(name)
    assert (running.state("a")["starts"], device.refusals) == (1, 0)


class _Hiding(SimulatedDevice):
    """As in a container that does not show processes: the total alone."""

    def process_bytes(self, pid: int, baseline_bytes: int = 0) -> int | None:
        return None


async def test_where_processes_are_hidden_the_total_proves_a_release(serve: Serve, device: SimulatedDevice) -> None:
    running = await serve(model("a"), model("b"), model("liar", Knobs(kept_bytes=40 * MiB)), on=_Hiding(device.path))
    for name in ("a", "b", "a", "liar"):
        await running.ask(name)
    assert running.state("a")["starts"] == 1
    pid = running.state("liar")["pid"]
    await running.ask("b")
    assert not alive(pid)
    assert device.refusals == 0


async def test_one_that_takes_no_term_is_killed(serve: Serve, tmp_path: Path) -> None:
    hasty = dataclasses.replace(HASTY, term_s=0.2)
    running = await serve(model("deaf", Knobs(deaf=True, hang_at="stop")), settings=hasty)
    await running.ask("deaf")
    pid = running.state("deaf")["pid"]
    await running.manager.close(0.0)
    assert not alive(pid)


async def test_what_a_worker_forked_ends_with_it(serve: Serve) -> None:
    running = await serve(model("a", Knobs(orphan=True)))
    await running.ask("a")
    pid = running.state("a")["pid"]
    (child,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    await running.until(lambda: start_ticks(child.pid) is None)


async def test_a_worker_killed_while_it_answers_tells_those_inside_and_serves_those_behind(serve: Serve) -> None:
    running = await serve(model("a", Knobs(token_s=0.05, tokens=20), max_in_flight=2))
    lost = []

    async def ask() -> str:
        async with running.manager.admit("a") as ticket:
            try:
                return await post(ticket)
            except aiohttp.ClientError:
                await asyncio.wait_for(ticket.lost.wait(), 5.0)
                lost.append(ticket)
                return "lost"

    asking = [asyncio.create_task(ask()) for _ in range(6)]
    await running.until(lambda: running.state("a")["in_flight"] == 2)
    await asyncio.sleep(0.1)
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    results = await asyncio.gather(*asking)
    assert results.count("lost") == 2
    assert len(lost) == 2
    assert all(result.startswith("a 1 2") for result in results if result != "lost")
    assert running.state("a")["crashes"] == 1


async def test_a_request_that_kills_its_worker_does_not_fail_the_model_for_others(serve: Serve, tmp_path: Path) -> None:
    knobs = Knobs(crash_at="request", times=2, counter=str(tmp_path / "counter"))
    running = await serve(model("a", knobs, max_in_flight=1))
    results = await outcomes(running, "a", 6)
    assert [result for result in results if isinstance(result, str)] == ["a 1 2 3 "] * 4
    assert sum(isinstance(result, aiohttp.ClientError) for result in results) == 2


async def test_a_model_that_grows_over_its_promise_makes_room_before_it_is_over_budget(
    serve: Serve, device: SimulatedDevice
) -> None:
    greedy = Knobs(weights_bytes=40 * MiB, kv_bytes=0, extra_bytes=30 * MiB)
    running = await serve(model("greedy", greedy), model("small", SMALL), device_bytes=80 * MiB)
    await running.ask("small")
    await running.ask("greedy")
    await running.until(lambda: running.state("greedy")["promised_bytes"] == 71 * MiB)
    await running.until(lambda: running.state("small")["shown_as"] == "source")
    assert await running.ask("greedy") == "greedy 1 2 3 "
    await running.ask("small")
    state = running.manager.snapshot()["devices"][0]
    assert state["measured_bytes"] <= state["promised_bytes"] <= 80 * MiB


async def test_a_model_that_grows_over_the_whole_budget_leaves_and_says_so(serve: Serve) -> None:
    greedy = Knobs(weights_bytes=40 * MiB, kv_bytes=0, extra_bytes=60 * MiB)
    running = await serve(model("greedy", greedy), device_bytes=80 * MiB)
    await running.ask("greedy")
    await running.until(lambda: running.state("greedy")["weights"] != "device")
    with pytest.raises(MballError, match="the device's budget is 80"):
        await running.ask("greedy")
