"""What must hold of the books at every moment in which nobody moves a model. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.states import Process
from mball.units import format_bytes


def broken(models: Mapping[str, Model], device: Ledger, dram: Ledger) -> list[str]:
    """Each in a sentence; [] where the books are right."""
    found = [text for ledger in (device, dram) for text in _of_ledger(ledger, models)]
    for model in models.values():
        if not model.settled:
            continue
        held, image = device.held(model.name), model.image
        if model.worker is None and model.state.process in (Process.GONE, Process.FAILED) and held:
            found.append(f"{model.name} has no process, and {format_bytes(held)} of {device.name} are promised to it")
        if model.queue.is_open and not model.on_device:
            found.append(f"{model.name} is {model.state}, and its door is open")
        if model.on_device and held <= model.context_bytes and model.measured_bytes > held:
            found.append(f"{model.name} is on the device, and only its context is promised to it")
        kept = dram.held(model.name)
        if kept != (image.nbytes if image is not None else 0) and (image is None or image.ready):
            found.append(f"{model.name} has an image, or none, and {format_bytes(kept)} of {dram.name} are promised")
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
