"""What an engine gives up for a balloon: KV first, then layers, where the model may be streamed. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Give:
    """`kv_bytes` of the whole KV pool, and a number of cells that hold layers from now on."""

    kv_bytes: int
    cells: int


def share(nbytes: int, *, easy_bytes: int, most_cells: int, least_cells: int, cell_bytes: Callable[[int], int]) -> Give:
    """How `nbytes` are given: of the KV pool up to `easy_bytes`, which no sequence of the longest kind misses, then as
    few cells as do, at last of the KV pool again. `cell_bytes` is what a number of cells holds."""
    whole = cell_bytes(most_cells)
    cells = most_cells
    while cells > least_cells and whole - cell_bytes(cells) < nbytes - easy_bytes:
        cells -= 1
    return Give(max(0, nbytes - (whole - cell_bytes(cells))), cells)
