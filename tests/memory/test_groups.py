"""Models that are spread over several devices, as one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mball.device.device import open_devices
from mball.device.simulated import SimulatedDevice
from mball.errors import ConfigError, DeviceInUse
from mball.memory.spec import ModelSpec
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import Serve, model
from tests.sparse_model import sparse_model

Spread = Callable[..., ModelSpec]


@pytest.fixture
def spread(tmp_path: Path) -> Spread:
    """Of which each rank has 60 MiB of weights and 20 MiB of KV."""

    def make(name: str, ranks: int = 2) -> ModelSpec:
        path = sparse_model(tmp_path / name, layers=4, layer_bytes=ranks * 10 * MiB, rest_bytes=ranks * 20 * MiB)
        spec = model(name, Knobs(weights_bytes=60 * MiB, kv_bytes=20 * MiB))
        worker = replace(spec.worker, engine="vllm", engine_args={"tensor_parallel_size": ranks}, path=str(path))
        return replace(spec, worker=replace(worker, kv_cache_bytes=20 * MiB))

    return make


@pytest.fixture
def gpus(tmp_path: Path) -> list[SimulatedDevice]:
    return [SimulatedDevice.create(tmp_path / f"g{n}", (120 + n) * MiB, context_bytes=MiB) for n in range(3)]


def named(*gpus: SimulatedDevice) -> str:
    return "+".join(gpu.name for gpu in gpus)


async def test_they_take_turns_on_all_its_members_at_once(
    serve: Serve, spread: Spread, gpus: list[SimulatedDevice]
) -> None:
    pair = gpus[:2]
    running = await serve(spread("a"), spread("b"), on=open_devices([named(*pair)]), dram_bytes=200 * MiB)
    for turn in range(6):
        name = "ab"[turn % 2]
        assert await running.ask(name) == f"{name} 1 2 3 "
        pid = running.state(name)["pid"]
        # Of both members the same; the other model sleeps beside it, or is gone.
        assert [gpu.process_bytes(pid) for gpu in pair] == [81 * MiB, 81 * MiB]
        assert running.state(name)["device"] == named(*pair)
    assert all(gpu.refusals == 0 for gpu in pair)
    assert gpus[2].holders() == {}
    assert running.manager.snapshot()["books_wrong"] == []


async def test_what_a_killed_one_held_is_proven_free_on_every_member(
    serve: Serve, spread: Spread, gpus: list[SimulatedDevice]
) -> None:
    running = await serve(spread("a"), spread("b"), on=open_devices([named(*gpus[:2])]))
    await running.ask("a")
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    assert await running.ask("b") == "b 1 2 3 "
    assert all(gpu.refusals == 0 for gpu in gpus)


async def test_others_on_one_member_leave_less_of_all(
    serve: Serve, spread: Spread, gpus: list[SimulatedDevice]
) -> None:
    gpus[1].attach(os.getpid())
    gpus[1].take(os.getpid(), 29 * MiB)
    running = await serve(spread("a"), on=open_devices([named(*gpus[:2])]))
    assert await running.ask("a") == "a 1 2 3 "
    assert gpus[1].free_bytes() == 121 * MiB - 30 * MiB - 81 * MiB


async def test_each_goes_where_there_are_as_many_as_it_has_ranks(
    serve: Serve, spread: Spread, gpus: list[SimulatedDevice]
) -> None:
    devices = open_devices([gpus[0].name, named(*gpus[1:])])
    running = await serve(spread("one", 1), spread("two"), model("small"), on=devices)
    for name in ("one", "two", "small"):
        await running.ask(name)
    assert running.state("two")["device"] == named(*gpus[1:])
    assert running.state("small")["device"] == gpus[0].name
    assert all(gpu.refusals == 0 for gpu in gpus)


@pytest.mark.parametrize(
    ("ranks", "devices", "says"),
    [
        (2, ["0"], r"a: its engine takes 2 GPUs, .* name so many as one \(device: cuda:0\+cuda:1\)"),
        (3, ["0+1"], "a: its engine takes 3 GPUs"),
        (1, ["0+1"], r"a: its engine takes one GPU, .* with tensor_parallel_size"),
        (2, ["0+1", "1"], "name each once"),
        (2, ["0+1", "1+2"], "name each once"),
    ],
)
async def test_what_can_not_be_is_refused_at_once(
    serve: Serve, spread: Spread, gpus: list[SimulatedDevice], ranks: int, devices: list[str], says: str
) -> None:
    names = ["+".join(gpus[int(number)].name for number in each.split("+")) for each in devices]
    with pytest.raises(ConfigError, match=says):
        await serve(spread("a", ranks), on=open_devices(names))


async def test_a_member_is_claimed_for_this_daemon(serve: Serve, spread: Spread, gpus: list[SimulatedDevice]) -> None:
    await serve(spread("a"), on=open_devices([named(*gpus[:2])]))
    with pytest.raises(DeviceInUse, match="is managed by another MBALL"):
        await serve(model("b"), on=gpus[1])
    await serve(model("b"), on=gpus[2])
