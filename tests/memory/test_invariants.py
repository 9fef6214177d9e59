"""The books: what must hold of them, and that a mistake in them is seen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from mball.errors import DeviceOutOfMemory
from mball.memory.images import Image
from mball.memory.invariants import broken, broken_images
from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.settings import Settings
from mball.memory.states import Process, State, Weights
from tests.memory.conftest import Running, Serve, model, slot_of


def books() -> tuple[dict[str, Model], Ledger, Ledger]:
    models = {name: Model(model(name), Settings(), 0, lambda: None, lambda: None) for name in "ab"}
    return models, Ledger("gpu", 100), Ledger("dram", 100)


def wrong(models: dict[str, Model], device: Ledger, dram: Ledger) -> list[str]:
    return broken(models, device) + broken_images(models, dram)


def on_device(found: Model) -> None:
    found.state = State(Process.ALIVE, Weights.DEVICE)
    found.context_bytes = 1


MISTAKES: dict[str, Callable[[dict[str, Model], Ledger, Ledger], None]] = {
    "no process": lambda models, device, dram: device.promise("a", 10),
    "no model": lambda models, device, dram: device.promise("c", 10),
    "in all": lambda models, device, dram: device._held.update({"a": 60, "b": 60}),
    "bytes are promised to a": lambda models, device, dram: device._held.update({"a": -1}),
    "door is open": lambda models, device, dram: models["a"].queue.open("/run/a.sock"),
    "only its context": lambda models, device, dram: (
        on_device(models["a"]),
        device.promise("a", 1),
        setattr(models["a"], "measured_bytes", 50),
    )[0],
    "has an image, or none": lambda models, device, dram: dram.promise("b", 5),
    "are promised": lambda models, device, dram: setattr(models["b"], "image", Image(-1, 7, ready=True)),
}


@pytest.mark.parametrize("says", MISTAKES)
async def test_a_mistake_is_named(says: str) -> None:
    models, device, dram = books()
    assert wrong(models, device, dram) == []
    MISTAKES[says](models, device, dram)
    found = wrong(models, device, dram)
    assert any(says in text for text in found), found
    async with models["a"].lock, models["b"].lock:
        moving = wrong(models, device, dram)
    assert all("gpu" in text or "dram" in text for text in moving), "what is being moved is judged afterwards"


async def test_a_mistake_is_told_once_as_long_as_it_lasts(serve: Serve) -> None:
    running: Running = await serve(model("a"))
    await running.ask("a")
    with capture_logs() as logs:
        slot_of(running.manager).ledger._held["nobody"] = 5
        await running.until(lambda: any(line["event"] == "books wrong" for line in logs))
        assert running.manager.snapshot()["books_wrong"]
        await asyncio.sleep(0.2)
    assert [line["log_level"] for line in logs if line["event"] == "books wrong"] == ["error"]
    slot_of(running.manager).ledger.give_back("nobody")
    assert running.manager.snapshot()["books_wrong"] == []


steps = st.lists(
    st.tuples(st.sampled_from(["promise", "give", "limit"]), st.sampled_from("abc"), st.integers(0, 150)), max_size=40
)


@given(st.integers(0, 120), steps)
def test_no_order_of_steps_breaks_a_ledger(total: int, wanted: list[tuple[str, str, int]]) -> None:
    ledger, held, limit = Ledger("dram", total), dict.fromkeys("abc", 0), total
    for verb, holder, nbytes in wanted:
        if verb == "give":
            ledger.give_back(holder)
            held[holder] = 0
        elif verb == "limit":
            ledger.limit(nbytes)
            limit = min(nbytes, total)
        else:
            fits = nbytes <= held[holder] or sum(held.values()) - held[holder] + nbytes <= limit
            try:
                ledger.promise(holder, nbytes)
            except DeviceOutOfMemory:
                assert not fits
            else:
                assert fits
                held[holder] = nbytes
        assert ledger.holders() == {name: nbytes for name, nbytes in held.items() if nbytes}
        assert ledger.promised_bytes == sum(held.values()) <= total
        assert ledger.free_bytes == max(0, limit - sum(held.values()))
        assert ledger.excess_bytes == max(0, sum(held.values()) - limit)
        assert ledger.limit_bytes == limit
