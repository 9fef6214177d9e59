"""One move at a time for each device, each under an epoch of its own; who answers to an old one is ended."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from pathlib import Path

import psutil
import pytest

from mball.errors import TransitionError
from mball.memory.lease import Lease
from mball.memory.process import WorkerProcess
from mball.memory.spec import WorkerSpec
from mball.units import MiB
from tests.fake_worker import Knobs, command
from tests.memory.conftest import QUICK, Serve, model


async def test_one_holds_it_at_a_time_and_no_epoch_comes_twice() -> None:
    lease, inside, epochs = Lease(), 0, []

    async def move() -> None:
        nonlocal inside
        async with lease.hold() as epoch:
            epochs.append(epoch)
            inside += 1
            assert inside == 1
            assert lease.busy
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(move() for _ in range(20)))
    assert epochs == sorted(set(epochs))
    assert not lease.busy


async def test_a_move_that_fails_gives_it_back() -> None:
    lease = Lease()
    with pytest.raises(TransitionError):
        async with lease.hold() as first:
            raise TransitionError("no")
    async with asyncio.timeout(5.0), lease.hold() as second:
        assert second > first


@pytest.mark.parametrize("verb", ["promote", "demote"])
async def test_a_worker_that_answers_to_an_epoch_that_has_ended_is_killed(runtime_dir: Path, verb: str) -> None:
    worker, _ = await WorkerProcess.start(
        command(),
        WorkerSpec(model="m", path="/m", socket_path=str(runtime_dir / "s")),
        extra_environment=Knobs(promote_s=0.3, demote_s=0.3).environment(),
        log=runtime_dir / "m.log",
        settings=QUICK,
    )
    with pytest.raises(TransitionError, match="no answer"):
        await worker.call(verb, deadline_s=0.05, epoch=1)
    assert await worker.wait(20.0)
    assert worker.exit_code == -signal.SIGKILL
    await worker.stop(QUICK)


async def test_a_late_status_is_no_crime_but_silence_is(runtime_dir: Path) -> None:
    worker, _ = await WorkerProcess.start(
        command(),
        WorkerSpec(model="m", path="/m", socket_path=str(runtime_dir / "s")),
        extra_environment=Knobs().environment(),
        log=runtime_dir / "m.log",
        settings=QUICK,
    )
    process = psutil.Process(worker.pid)
    process.suspend()
    with pytest.raises(TransitionError, match="no answer"):
        await worker.call("status", deadline_s=0.1)
    process.resume()
    assert (await worker.call("status", deadline_s=10.0))["resident"] is False
    process.suspend()
    for _ in range(3):
        assert not worker.exited.is_set()
        with pytest.raises(TransitionError, match="no answer"):
            await worker.call("status", deadline_s=0.1)
    assert await worker.wait(20.0)
    await worker.stop(QUICK)


async def test_a_worker_that_hangs_while_it_serves_is_ended_and_its_model_served_anew(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, verb_s=0.2)
    running = await serve(model("a"), settings=settings)
    await running.ask("a")
    first = running.state("a")["pid"]
    psutil.Process(first).suspend()
    asking = asyncio.create_task(running.ask("a"))
    await running.until(lambda: running.state("a")["crashes"] == 1)
    await asyncio.gather(asking, return_exceptions=True)
    await running.ask("a")
    assert running.state("a")["pid"] != first


async def test_a_worker_that_hangs_asleep_or_at_its_image_is_ended_before_it_is_needed(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, verb_s=0.2, idle_sample_s=0.1)
    running = await serve(model("a", Knobs(image_s=60.0)), settings=settings)
    await running.ask("a")
    psutil.Process(running.state("a")["pid"]).suspend()
    await running.until(lambda: running.state("a")["crashes"] == 1)
    await running.ask("a")
    await running.manager.unload("a")
    psutil.Process(running.state("a")["pid"]).suspend()
    await running.until(lambda: running.state("a")["crashes"] == 2)
    assert await running.ask("a") == "a 1 2 3 "


async def test_a_start_holds_it_to_reserve_its_bytes_alone(serve: Serve) -> None:
    """Others switch while a model starts, and its context's bytes are promised all the while."""
    small = Knobs(weights_bytes=40 * MiB, kv_bytes=10 * MiB)
    running = await serve(model("slow", Knobs(start_s=3.0, weights_bytes=8 * MiB, kv_bytes=0)), model("a", small))
    await running.ask("a")
    starting = asyncio.create_task(running.ask("slow"))
    await running.until(lambda: running.state("slow")["process"] == "starting")
    assert running.state("slow")["promised_bytes"] >= 1 * MiB
    for _ in range(2):
        await running.manager.unload("a")
        await running.ask("a")
    assert running.state("slow")["process"] == "starting"
    assert running.state("a")["promotions"] == 3
    await starting
