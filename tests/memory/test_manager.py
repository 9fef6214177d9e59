from __future__ import annotations

from mball.device.simulated import SimulatedDevice
from tests.memory.conftest import model


async def test_models_take_turns_on_a_device_with_room_for_one(serve, device: SimulatedDevice) -> None:
    running = await serve(model("a"), model("b"))
    assert await running.ask("a") == "a 1 2 3 "
    assert running.state("a")["shown_as"] == "device"
    assert await running.ask("b") == "b 1 2 3 "
    assert running.state("a")["shown_as"] == "source"
    assert await running.ask("a") == "a 1 2 3 "
    assert running.manager.snapshot()["promotions"] == 3
    assert device.refusals == 0
