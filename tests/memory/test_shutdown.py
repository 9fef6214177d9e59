"""However the manager ends, no process stays."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mball.device.proc import start_ticks
from mball.device.simulated import SimulatedDevice
from mball.errors import DeviceInUse, Draining
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import Serve, model, post

SERVER = """
import asyncio, signal, sys
from pathlib import Path
from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from tests.fake_worker import Knobs, command
from tests.memory.conftest import QUICK, model

async def main():
    device, knobs = SimulatedDevice(sys.argv[1]), eval(sys.argv[3])
    manager = Manager([model("a", knobs), model("b")], [(device, device.total_bytes)], dram_bytes=1 << 30,
                      runtime_dir=Path(sys.argv[2]), command_for=lambda spec: command(), settings=QUICK)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await manager.start()
    print("started", flush=True)
    asking = [asyncio.create_task(manager.load(name)) for name in ("a", "b", "a")]
    await stop.wait()
    await manager.close(2.0)
    results = await asyncio.gather(*asking, return_exceptions=True)
    print(len(results), flush=True)

asyncio.run(main())
"""


def workers_of(folder: Path) -> set[int]:
    """Pids of all processes whose command line names the folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in line and b"fake_worker.py" in line and start_ticks(int(entry.name)) is not None:
                found.add(int(entry.name))
    return found


async def until(condition: Callable[[], bool], deadline_s: float = 120.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - /proc has no events
            await asyncio.sleep(0.02)


STEPS = {
    "starting": Knobs(start_s=60.0),
    "promoting": Knobs(promote_s=60.0),
    "filling": Knobs(image_s=60.0),
    "demoting": Knobs(demote_s=60.0),
    "deaf": Knobs(deaf=True, hang_at="stop"),
    "forked": Knobs(orphan=True),
}


ENDINGS = [
    pytest.param(number, step, id=f"{number.name}-{step}")
    for number in (signal.SIGTERM, signal.SIGKILL)
    for step in STEPS
    # Nothing but the manager ends what a worker forked.
    if (number, step) != (signal.SIGKILL, "forked")
]


@pytest.mark.parametrize(("number", "step"), ENDINGS)
async def test_no_process_stays(device: SimulatedDevice, runtime_dir: Path, number: int, step: str) -> None:
    server = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", SERVER, str(device.path), str(runtime_dir), repr(STEPS[step])],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        await until(lambda: bool(workers_of(runtime_dir)))
        await asyncio.sleep(1.0)
        assert server.poll() is None
        server.send_signal(number)
        await until(lambda: server.poll() is not None)
        await until(lambda: not workers_of(runtime_dir))
        assert server.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        await until(lambda: device.holders() == {})
    finally:
        server.kill()
        output = server.communicate()[0]
    if number == signal.SIGTERM:
        assert output.rstrip().endswith("3")


async def test_those_inside_finish_those_waiting_are_told_and_newcomers_refused(serve: Serve) -> None:
    running = await serve(model("a", Knobs(token_s=0.1, tokens=5)), model("b"))
    await running.manager.load("a")
    inside = asyncio.create_task(running.ask("a"))
    await running.until(lambda: running.state("a")["in_flight"] == 1)
    waiting = asyncio.create_task(running.ask("b"))
    await running.until(lambda: running.state("b")["queued"] == 1)
    assert running.manager.not_ready() is None
    running.manager.begin_drain()
    assert running.manager.not_ready() == "shutting down"
    for refused in (waiting, running.ask("a"), running.manager.load("b")):
        with pytest.raises(Draining):
            await refused
    await running.manager.close(10.0)
    assert await inside == "a 1 2 3 4 "
    assert all(start_ticks(pid) is None for pid in running.pids)


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_drain_ends_at_its_deadline_or_when_it_is_hurried(serve: Serve, hurried: bool) -> None:
    running = await serve(model("a"))
    async with running.manager.admit("a") as ticket:
        pid = running.state("a")["pid"]
        closing = asyncio.create_task(running.manager.close(60.0 if hurried else 0.2))
        await asyncio.sleep(0.05)
        assert await post(ticket) == "a 1 2 3 "
        if hurried:
            running.manager.begin_drain()
        await asyncio.wait_for(ticket.lost.wait(), 10.0)
    await closing
    assert start_ticks(pid) is None
    await running.manager.close(0.0)


async def test_closing_leaves_no_socket_no_descriptor_and_no_task(serve: Serve, runtime_dir: Path) -> None:
    before = await asyncio.to_thread(lambda: len(list(Path("/proc/self/fd").iterdir())))
    running = await serve(model("a"), model("b"), dram_bytes=500 * MiB)
    await running.ask("a")
    await running.ask("b")
    await running.manager.close(1.0)
    assert not await asyncio.to_thread(lambda: list(runtime_dir.glob("*.sock")))
    assert await asyncio.to_thread(lambda: len(list(Path("/proc/self/fd").iterdir()))) <= before
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert running.manager.snapshot()["devices"][0]["promised_bytes"] == 0


async def test_a_second_daemon_is_refused_and_the_first_ones_sockets_stay(
    serve: Serve, device: SimulatedDevice
) -> None:
    running = await serve(model("a"))
    await running.ask("a")
    with pytest.raises(DeviceInUse, match="is managed by another MBALL"):
        await serve(model("b"))
    await running.ask("a")
