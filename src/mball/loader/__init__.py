"""Weights from safetensors files into memory that the tensors own.

What is named here is imported when it is first used: headers are read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mball.loader.binding import Piece
    from mball.loader.checkpoint import Checkpoint
    from mball.loader.paths import Way
    from mball.loader.probe import tune
    from mball.loader.selection import Slice
    from mball.loader.tensors import load, stream
    from mball.loader.weights import LoadStats, Weights, load_into

__all__ = ["Checkpoint", "LoadStats", "Piece", "Slice", "Way", "Weights", "load", "load_into", "stream", "tune"]

_MODULES = {
    "Checkpoint": "checkpoint",
    "LoadStats": "weights",
    "Piece": "binding",
    "Slice": "selection",
    "Way": "paths",
    "Weights": "weights",
    "load": "tensors",
    "load_into": "weights",
    "stream": "tensors",
    "tune": "probe",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
