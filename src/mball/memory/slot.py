"""One device, with all that moves models on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mball.device.device import Device, members
from mball.device.lock import DeviceLock, lock_device
from mball.errors import DeviceError
from mball.memory.events import Events
from mball.memory.images import Images
from mball.memory.lease import Lease
from mball.memory.ledger import Ledger
from mball.memory.model import Model
from mball.memory.nursery import Nursery
from mball.memory.sampler import Sampler
from mball.memory.scheduler import Scheduler
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec
from mball.memory.swap_broker import SwapBroker
from mball.memory.transition import Transitions

if TYPE_CHECKING:
    from mball.memory.devices import Devices


class Slot:
    """The books, the lease and the movers of a device. Nothing of it is shared, so a switch waits for none elsewhere.

    `models`: those that belong here now. `lost`: why the device does not answer (None: it does).
    """

    def __init__(
        self,
        device: Device,
        nbytes: int,
        devices: Devices,
        images: Images,
        settings: Settings,
        events: Events,
        runtime_dir: Path,
        log_dir: Path,
        command_for: Callable[[ModelSpec], list[str]],
        nursery: Nursery,
        swap: SwapBroker,
    ) -> None:
        """`nbytes` are what all workers may hold of the device together."""
        self.device = device
        self.models: dict[str, Model] = {}
        self.ledger = Ledger(device.name, min(nbytes, device.total_bytes))
        self.lease = Lease()
        self.lost: DeviceError | None = None
        self.transitions = Transitions(
            device,
            self.ledger,
            images,
            settings,
            events,
            runtime_dir,
            log_dir,
            command_for,
            lambda model, worker: self.scheduler.worker_exited(model, worker),
            nursery.launch,
            swap,
        )
        self.scheduler = Scheduler(self, devices, images, settings, events)
        self.sampler = Sampler(self, nursery.workers, settings, events)
        self._locks: list[DeviceLock] = []
        self._runtime_dir = runtime_dir

    @property
    def name(self) -> str:
        return self.device.name

    def claim(self) -> None:
        """Takes the device for this daemon. Blocks for a moment. Raises DeviceInUse, DeviceError."""
        for name in members(self.name)[len(self._locks) :]:
            self._locks.append(lock_device(name, self._runtime_dir))

    def release(self) -> None:
        """Idempotent."""
        while self._locks:
            self._locks.pop().release()

    def snapshot(self) -> dict[str, object]:
        """JSON for `/mball/v1/state`."""
        models = self.models.values()
        return {
            "name": self.name,
            "total_bytes": self.ledger.total_bytes,
            "limit_bytes": self.ledger.limit_bytes,
            "promised_bytes": self.ledger.promised_bytes,
            "measured_bytes": sum(model.measured_bytes for model in models),
            "ballooned_bytes": sum(model.ballooned_bytes for model in models if model.on_device),
            "foreign_bytes": self.sampler.foreign.nbytes,
            "lost": None if self.lost is None else str(self.lost),
        }
