"""A model's weights and where they are: the part of every engine that moves them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from mball.device.account import Account
from mball.errors import UnsupportedCheckpoint
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.loader.weights import Weights
from mball.memory.spec import WorkerSpec
from mball.server.engine.footprint import LAYER_THREADS
from mball.server.engine.transformers_adapter import Model
from mball.swap.layers import LayeredWeights

Progress = Callable[[int, int], None]


def torch_device(name: str) -> torch.device:
    """A simulated device is the CPU. A worker on a GPU sees that GPU alone, as number 0."""
    return torch.device("cuda", 0) if name.startswith("cuda") else torch.device("cpu")


class ResidentWeights:
    """The weights of one module, bound once and loaded and released many times."""

    def __init__(
        self,
        spec: WorkerSpec,
        model: Model,
        checkpoint: Checkpoint,
        account: Account,
        device: torch.device,
        *,
        cells: int | None = None,
    ) -> None:
        """With `cells` the model's layers are streamed through room for so many of them.

        Raises TensorMismatch, UnsupportedCheckpoint, DeviceError.
        """
        self.module = model.module
        self._checkpoint = checkpoint
        # On the CPU its cores are the model's; on a GPU they have nothing better to do than to load.
        self._threads = spec.threads if device.type == "cpu" else None
        self._cancel = threading.Event()
        self._filling = threading.Event()
        self.layers = None if cells is None else _layered(model, checkpoint, account, device, cells)
        self._weights: Weights | LayeredWeights = self.layers or Weights.bind(
            model.module, checkpoint, device=device, sources=model.sources, ignore=model.ignored, account=account
        )
        self.resident = False

    @property
    def nbytes(self) -> int:
        """Bytes on the device now."""
        return self._weights.nbytes if self.resident else 0

    @property
    def ballooned_bytes(self) -> int:
        """Of the layers' room, what was given up."""
        layers = self.layers
        return 0 if layers is None else layers.bytes_of(layers.max_cells) - layers.bytes_of(layers.cells)

    @property
    def num_layers(self) -> int:
        return 0 if self.layers is None else self.layers.layout.num_layers

    @property
    def resident_layers(self) -> int:
        return 0 if self.layers is None else len(self.layers.layout.resident)

    def use_image(self, image_fd: int | None) -> None:
        """Where streamed layers come from. Raises CheckpointError, OSError, TransitionError."""
        if self.layers is not None:
            self.layers.use_image(image_fd)

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

    def fill_image(self, image_fd: int, cancel: threading.Event | None = None) -> int:
        unwanted = self._filling = cancel or threading.Event()
        if self._cancel.is_set():
            unwanted.set()
        return image.fill(self._checkpoint, image_fd, threads=self._threads, cancel=unwanted)

    def cancel(self) -> None:
        """A load, a fill, or a step that waits for a layer ends with Cancelled, for good. Called by any thread."""
        self._cancel.set()
        self._filling.set()
        if self.layers is not None:
            self.layers.cancel()

    def close(self) -> None:
        self.cancel()
        self.resident = False
        self._weights.close()


def _layered(
    model: Model, checkpoint: Checkpoint, account: Account, device: torch.device, cells: int
) -> LayeredWeights:
    if not model.layers:
        kind = type(model.module).__name__
        raise UnsupportedCheckpoint(
            f"no list of decoder layers was found in {kind}: leave resident_layers out", file=str(checkpoint.path)
        )
    return LayeredWeights.bind(
        model.module,
        model.layers,
        checkpoint,
        cells=cells,
        device=device,
        sources=model.sources,
        ignore=model.ignored,
        account=account,
        threads=LAYER_THREADS,
    )
