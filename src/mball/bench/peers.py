"""Loaders of others that fill a GPU. Each with its defaults, but for reads through the page cache where that is what
is measured: two of them go around it unless they are told otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mball.bench.contenders import Loader, Spec, files


def _fastsafetensors(spec: Spec) -> Loader:
    """All files at once, by its reader without GPUDirect Storage, which wants a driver of its own."""
    if not spec.cold:
        os.environ["FASTSAFETENSORS_ODIRECT"] = "0"
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # type: ignore[import-not-found]

    found = files(spec)

    def load() -> Mapping[str, Tensor]:
        loader = SafeTensorsFileLoader(SingleGroup(), device=spec.device, nogds=True)
        loader.add_filenames({0: found})
        buffers = loader.copy_files_to_device()
        # The tensors own their buffers after it is closed.
        tensors = {name: buffers.get_tensor(name) for name in buffers.key_to_rank_lidx}
        buffers.close()
        loader.close()
        return tensors

    return Loader(load)


def _runai(spec: Spec) -> Loader:
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    found = files(spec)

    def load() -> Mapping[str, Tensor]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(found, device=spec.device)
            return dict(streamer.get_tensors())

    return Loader(load)


def _instanttensor(spec: Spec) -> Loader:
    from instanttensor import BackendPolicy, safe_open  # type: ignore[import-not-found]

    found = files(spec)
    backend: Any = None if spec.cold else BackendPolicy.BUFFERED
    device = torch.device(spec.device).index or 0

    def load() -> Mapping[str, Tensor]:
        with safe_open(found, framework="pt", device=device, backend=backend) as opened:
            return dict(opened.tensors())

    return Loader(load)


LOADERS: dict[str, Callable[[Spec], Loader]] = {
    "fastsafetensors": _fastsafetensors,
    "runai": _runai,
    "instanttensor": _instanttensor,
}
