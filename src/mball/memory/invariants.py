"""What must hold of the books at every moment in which nobody moves a model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from mball.memory.devices import Devices
from mball.memory.events import Events
from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.states import Process
from mball.units import format_bytes


def broken(models: Mapping[str, Model], device: Ledger) -> list[str]:
    """What is wrong with the books of a device, whose models these are; each in a sentence."""
    found = _of_ledger(device, models)
    for model in models.values():
        if not model.settled:
            continue
        held = device.held(model.name)
        if model.worker is None and model.state.process in (Process.GONE, Process.FAILED) and held:
            found.append(f"{model.name} has no process, and {format_bytes(held)} of {device.name} are promised to it")
        if model.queue.is_open and not model.on_device:
            found.append(f"{model.name} is {model.state}, and its door is open")
        if model.on_device and held <= model.context_bytes and model.measured_bytes > held:
            found.append(f"{model.name} is on the device, and only its context is promised to it")
    return found


def broken_images(models: Mapping[str, Model], dram: Ledger) -> list[str]:
    """The same of the books of images; these are all models."""
    found = _of_ledger(dram, models)
    for model in models.values():
        kept, image = dram.held(model.name), model.image
        if not model.settled:
            continue
        if kept != (image.nbytes if image is not None else 0) and (image is None or image.ready):
            found.append(f"{model.name} has an image, or none, and {format_bytes(kept)} of {dram.name} are promised")
    return found


class Books:
    """Compares all ledgers with the models, and tells what is wrong with them."""

    def __init__(self, models: Mapping[str, Model], devices: Devices, dram: Ledger, events: Events) -> None:
        self._models = models
        self._devices = devices
        self._dram = dram
        self._events = events
        self._broken: set[str] = set()

    async def run(self, every_s: float) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            self.check()

    def check(self) -> list[str]:
        """What is wrong; told once as long as it lasts."""
        found = [text for slot in self._devices for text in broken(slot.models, slot.ledger)]
        found += broken_images(self._models, self._dram)
        for text in set(found) - self._broken:
            self._events.record("books wrong", None, text, level="error")
        self._broken = set(found)
        return found


def _of_ledger(ledger: Ledger, models: Mapping[str, Model]) -> list[str]:
    holders, found = ledger.holders(), []
    if sum(holders.values()) > ledger.total_bytes:
        promised, total = format_bytes(sum(holders.values())), format_bytes(ledger.total_bytes)
        found.append(f"{promised} of {ledger.name} are promised, of {total} in all")
    found += [
        f"{ledger.name}: {nbytes} bytes are promised to {name}" for name, nbytes in holders.items() if nbytes <= 0
    ]
    found += [
        f"{ledger.name}: bytes are promised to {name}, which is no model" for name in holders.keys() - models.keys()
    ]
    return found
