"""Weights from safetensors files into memory that the tensors own."""

from mball.loader.binding import Piece
from mball.loader.checkpoint import Checkpoint
from mball.loader.paths import Way
from mball.loader.probe import tune
from mball.loader.selection import Slice
from mball.loader.tensors import load, stream
from mball.loader.weights import LoadStats, Weights, load_into

__all__ = ["Checkpoint", "LoadStats", "Piece", "Slice", "Way", "Weights", "load", "load_into", "stream", "tune"]
