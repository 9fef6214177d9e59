"""Weights from safetensors files into memory that the tensors own."""

from mball.loader.binding import Piece
from mball.loader.checkpoint import Checkpoint
from mball.loader.tensors import load
from mball.loader.weights import LoadStats, Weights

__all__ = ["Checkpoint", "LoadStats", "Piece", "Weights", "load"]
