"""A model's weights and where they are: the part of every engine that moves them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from mball.device.account import Account
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.loader.weights import Weights
from mball.memory.spec import WorkerSpec
from mball.server.engine.transformers_adapter import Model

Progress = Callable[[int, int], None]


def torch_device(name: str) -> torch.device:
    """A simulated device is the CPU. A worker on a GPU sees that GPU alone, as number 0."""
    return torch.device("cuda", 0) if name.startswith("cuda") else torch.device("cpu")


class ResidentWeights:
    """The weights of one module, bound once and loaded and released many times."""

    def __init__(
        self, spec: WorkerSpec, model: Model, checkpoint: Checkpoint, account: Account, device: torch.device
    ) -> None:
        self.module = model.module
        self._checkpoint = checkpoint
        # On the CPU its cores are the model's; on a GPU they have nothing better to do than to load.
        self._threads = spec.threads if device.type == "cpu" else None
        self._cancel = threading.Event()
        self._weights = Weights.bind(
            model.module, checkpoint, device=device, sources=model.sources, ignore=model.ignored, account=account
        )
        self.resident = False

    @property
    def nbytes(self) -> int:
        """Bytes on the device now."""
        return self._weights.nbytes if self.resident else 0

    @property
    def image_bytes(self) -> int:
        return self._checkpoint.image_bytes

    def load(self, image_fd: int | None, progress: Progress | None) -> float:
        """Seconds taken. Raises DeviceOutOfMemory, CheckpointError, Cancelled; then nothing is held."""
        began = time.perf_counter()
        self._weights.load(image_fd, threads=self._threads, progress=progress, cancel=self._cancel)
        self.resident = True
        return time.perf_counter() - began

    def release(self) -> int:
        """Bytes given back."""
        self.resident = False
        return self._weights.release()

    def fill_image(self, image_fd: int) -> int:
        return image.fill(self._checkpoint, image_fd, threads=self._threads, cancel=self._cancel)

    def close(self) -> None:
        """A load or a fill under way ends with Cancelled."""
        self._cancel.set()
        self.resident = False
        self._weights.close()
