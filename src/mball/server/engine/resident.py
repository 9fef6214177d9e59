"""A model's weights and where they are: the part of every engine that moves them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from mball.device.account import Account
from mball.errors import ReadError, UnsupportedCheckpoint
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.loader.source import ImageReader
from mball.loader.weights import Weights
from mball.memory.spec import WorkerSpec
from mball.server.engine import experts
from mball.server.engine.footprint import GPU_LAYER_THREADS, LAYER_THREADS
from mball.server.engine.transformers_adapter import Model
from mball.swap.experts import ExpertWeights
from mball.swap.layers import LayeredWeights

Progress = Callable[[int, int], None]

_REQUESTS = 16
"""An average is of about the last so many."""


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
        """With `cells` the model's layers, or its experts, are streamed through room for so many of them.

        Raises TensorMismatch, UnsupportedCheckpoint, DeviceError.
        """
        self.module = model.module
        self._checkpoint = checkpoint
        # On the CPU its cores are the model's; on a GPU they have nothing better to do than to load.
        self._threads = spec.threads if device.type == "cpu" else None
        self._cancel = threading.Event()
        self._filling = threading.Event()
        self.streamed = None if cells is None else _streamed(spec, model, checkpoint, account, device, cells)
        self._weights: Weights | LayeredWeights | ExpertWeights = self.streamed or Weights.bind(
            model.module, checkpoint, device=device, sources=model.sources, ignore=model.ignored, account=account
        )
        self.resident = False
        self._requests = 0
        self._steps_each = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes on the device now."""
        return self._weights.nbytes if self.resident else 0

    @property
    def ballooned_bytes(self) -> int:
        """Of the room for what is streamed, what was given up."""
        streamed = self.streamed
        return 0 if streamed is None else streamed.bytes_of(streamed.max_cells) - streamed.bytes_of(streamed.cells)

    @property
    def num_layers(self) -> int:
        """0 where they are not streamed."""
        return self.streamed.layout.num_layers if isinstance(self.streamed, LayeredWeights) else 0

    @property
    def resident_layers(self) -> int:
        return len(self.streamed.layout.resident) if isinstance(self.streamed, LayeredWeights) else 0

    @property
    def num_experts(self) -> int:
        """Of all layers; 0 where they are not streamed."""
        return self.streamed.num_experts if isinstance(self.streamed, ExpertWeights) else 0

    @property
    def resident_experts(self) -> int:
        """As many as there is room for."""
        return self.streamed.cells if isinstance(self.streamed, ExpertWeights) else 0

    def request_took(self, steps: int) -> None:
        """A request has ended well."""
        self._requests = min(self._requests + 1, _REQUESTS)
        self._steps_each += (steps - self._steps_each) / self._requests

    @property
    def layer_offer(self) -> tuple[int, float]:
        """Bytes of what is streamed that could be given, and how much longer a request would take; nothing while that
        was not measured."""
        streamed = self.streamed
        if streamed is None or not self.resident or not self._requests:
            return 0, 0.0
        longer_s = streamed.longer_s
        return (0, 0.0) if longer_s is None else (streamed.gives_bytes, self._steps_each * longer_s)

    def use_image(self, image_fd: int | None) -> None:
        """Where what is streamed comes from. Raises CheckpointError, OSError, TransitionError."""
        if self.streamed is not None:
            self.streamed.use_image(image_fd)

    @property
    def image_bytes(self) -> int:
        return self._checkpoint.image_bytes

    def image_key(self) -> bytes | None:
        """Names the image of the files as they are now; None where they can't be read, or it is streamed."""
        if self.streamed is not None:
            return None
        try:
            return image.key(self._checkpoint)
        except ReadError:
            return None

    def load(self, image_fd: int | None, progress: Progress | None, stored: ImageReader | None = None) -> float:
        """Seconds taken. Raises DeviceOutOfMemory, CheckpointError, SwapMiss, Cancelled; then nothing is held."""
        began = time.perf_counter()
        if isinstance(self._weights, Weights):
            self._weights.load(image_fd, threads=self._threads, progress=progress, cancel=self._cancel, stored=stored)
        else:
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
        if self.streamed is not None:
            self.streamed.cancel()

    def close(self) -> None:
        self.cancel()
        self.resident = False
        self._weights.close()


def _streamed(
    spec: WorkerSpec, model: Model, checkpoint: Checkpoint, account: Account, device: torch.device, cells: int
) -> LayeredWeights | ExpertWeights:
    option, found = "resident_layers", model.layers
    if spec.resident_experts is not None:
        option, found = "resident_experts", model.experts
    if not found:
        what = "decoder layers" if option == "resident_layers" else "experts"
        raise UnsupportedCheckpoint(
            f"no {what} were found in {type(model.module).__name__}: leave {option} out", file=str(checkpoint.path)
        )
    options: dict[str, Any] = {
        "cells": cells,
        "device": device,
        "sources": model.sources,
        "ignore": model.ignored,
        "account": account,
        "threads": LAYER_THREADS if device.type == "cpu" else GPU_LAYER_THREADS,
    }
    if option == "resident_layers":
        return LayeredWeights.bind(model.module, found, checkpoint, **options)
    weights = ExpertWeights.bind(model.module, found, checkpoint, **options)
    experts.stream(found, weights.turn)
    return weights
