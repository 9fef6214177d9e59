"""Which layers of a model vLLM is to keep in host memory, by its own prefetch offload: pure.

Of every group of layers the last ones are cold. They pass through `prefetch_step` buffers on the device, each of a
layer's size, and a buffer is filled anew once its layer has been computed: behind the layers that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mball.swap.layers_plan import Sizes


@dataclass(frozen=True, slots=True)
class Cold:
    """`count` of a model's `num_layers` are cold; the rest are what vLLM is told."""

    num_layers: int
    count: int
    group_size: int
    num_in_group: int
    prefetch_step: int

    @property
    def saved(self) -> int:
        """Layers' room that it spares."""
        return self.count - self.prefetch_step

    def options(self) -> dict[str, int]:
        """By vLLM's names."""
        return {
            "offload_group_size": self.group_size,
            "offload_num_in_group": self.num_in_group,
            "offload_prefetch_step": self.prefetch_step,
        }

    def held_bytes(self, sizes: Sizes) -> int:
        """Of weights on the device."""
        return sizes.held_bytes(self.num_layers - self.saved)

    def host_bytes(self, sizes: Sizes) -> int:
        """Of weights in host memory."""
        return self.count * sizes.cell_bytes


def fitting(sizes: Sizes, room_bytes: int) -> Cold | None:
    """The fewest cold layers with which the weights fit; as many as can be where they don't. None: all may stay."""
    if sizes.whole_bytes <= room_bytes:
        return None
    ways = list(_ways(sizes.count))
    fit = [way for way in ways if way.held_bytes(sizes) <= room_bytes]
    return min(fit, key=_slowness) if fit else max(ways, key=lambda way: way.saved, default=None)


def staying(num_layers: int, resident: int) -> Cold | None:
    """So that `resident` layers stay, or as many fewer as vLLM's groups want. None: all stay."""
    wanted = num_layers - resident
    return min((way for way in _ways(num_layers) if way.count >= wanted > 0), key=_slowness, default=None)


def _slowness(way: Cold) -> tuple[bool, int, int]:
    neighbours = way.num_in_group > 1 or way.group_size == 1
    return neighbours and way.prefetch_step == 1, way.count, way.num_in_group


def _ways(num_layers: int) -> Iterator[Cold]:
    """Those that spare anything. Neighbours need a second buffer, or each waits for its copy."""
    for size in range(1, num_layers + 1):
        for cold in range(1, size + 1):
            count = num_layers // size * cold + max(0, num_layers % size - (size - cold))
            for step in (1, 2):
                # Where buffers don't divide the layers evenly, vLLM 0.26 fills one that is still to be computed with.
                if count > step and count % step == 0:
                    yield Cold(num_layers, count, size, cold, step)
