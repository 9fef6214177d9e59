"""Which layers of a model stay on its device, and how many slots the others pass through: pure.

All layers run once a step, in order, and then again: whatever was used last is wanted last, so the set that stays is
fixed, and spread evenly, so that copies always have computing to hide behind. Memory is counted in cells, each of which
holds one layer: `slots` of them take the streamed layers in turn.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from typing import Literal

from mball.loader.checkpoint import Checkpoint
from mball.loader.plan import aligned

LEAST_SLOTS = 2
"""One is computed with while the next is filled."""

MOST_SLOTS = 8
_CYCLES = 6
_GAIN = 0.99
"""A further slot costs a resident layer: it must be worth a hundredth of the step."""

_LAYER = re.compile(r"^(.*?)(?:layers|h|blocks|block)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(?:(\d+)\.)?")

Wish = int | Literal["auto"]
"""`resident_layers` or `resident_experts`, as it is configured."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`streamed` layers pass through `slots` cells; each other one has a cell of its own."""

    num_layers: int
    streamed: tuple[int, ...]
    slots: int

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.num_layers)) - set(self.streamed)))


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds: one layer's copy, one layer's computing, and from a step's last layer to the next one's first."""

    copy_s: float
    compute_s: float
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model's weights of which `count` equal parts are streamed, layers or experts: bytes beside them, of the cell
    that holds any one of them, and of all as they are."""

    count: int
    rest_bytes: int
    cell_bytes: int
    whole_bytes: int

    def held_bytes(self, cells: int) -> int:
        return self.rest_bytes + cells * self.cell_bytes


def layout(num_layers: int, cells: int, rates: Rates | None = None) -> Layout:
    """The best use of so many cells; without rates as few slots as work.

    Raises ValueError for fewer cells than LEAST_SLOTS (where there are more layers than that).
    """
    if cells >= num_layers:
        return Layout(num_layers, (), 0)
    if cells < LEAST_SLOTS:
        raise ValueError(f"{cells} cells for {num_layers} layers: {LEAST_SLOTS} at least")
    best = _with_slots(num_layers, cells, LEAST_SLOTS)
    if rates is None:
        return best
    best_s = step_s(best, rates)
    for slots in range(LEAST_SLOTS + 1, min(MOST_SLOTS, cells) + 1):
        other = _with_slots(num_layers, cells, slots)
        other_s = step_s(other, rates)
        if other_s < _GAIN * best_s:
            best, best_s = other, other_s
    return best


def spread(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` of the layers, as far from each other as they can be, also from one step to the next."""
    return tuple((2 * number + 1) * num_layers // (2 * count) for number in range(count))


def step_s(chosen: Layout, rates: Rates) -> float:
    """What a step takes once steps follow each other: copies go one at a time, each into a slot whose layer has been
    computed; a layer is computed after the one before it and after its copy."""
    streamed = frozenset(chosen.streamed)
    slots = [0.0] * max(1, chosen.slots)
    copied = computed = 0.0
    ends: list[float] = []
    turn = 0
    for _ in range(_CYCLES):
        for layer in range(chosen.num_layers):
            if layer in streamed:
                copied = max(copied, slots[turn]) + rates.copy_s
                computed = max(computed, copied) + rates.compute_s
                slots[turn] = computed
                turn = (turn + 1) % len(slots)
            else:
                computed += rates.compute_s
        computed += rates.idle_s
        ends.append(computed)
    half = _CYCLES // 2
    return (ends[-1] - ends[-1 - half]) / half


def cells_for(wish: Wish, sizes: Sizes, *, limit_bytes: int | None = None, beside_bytes: int = 0) -> int:
    """Cells for that many resident parts and the slots of the others; `auto`: as many as fit into `limit_bytes` with
    `beside_bytes` and an eighth of the weights for what is not known yet; all without a limit. Never too few to run."""
    least = min(LEAST_SLOTS, sizes.count)
    if wish == "auto":
        cells = sizes.count
        if limit_bytes is not None:
            room = (limit_bytes - beside_bytes) * 8 // 9 - sizes.rest_bytes
            cells = room // sizes.cell_bytes if sizes.cell_bytes else cells
    else:
        cells = wish if wish >= sizes.count else wish + LEAST_SLOTS
    return max(least, min(cells, sizes.count))


def sizes_of(checkpoint: Checkpoint, num_layers: int, item_bytes: int) -> Sizes:
    """By the names of the checkpoint's tensors, computed with in `item_bytes` a number (TensorInfo.bytes_as)."""
    lists: dict[str, dict[int, int]] = {}
    rest = whole = 0
    for tensor in checkpoint.tensors.values():
        nbytes = tensor.bytes_as(item_bytes)
        whole += nbytes
        found = _LAYER.match(tensor.name)
        if found is not None and int(found[2]) < num_layers:
            layers = lists.setdefault(found[1], {})
            layers[int(found[2])] = layers.get(int(found[2]), 0) + aligned(nbytes)
        else:
            rest += aligned(nbytes)
    # A model may have several lists, as of an image's encoder: the decoder's is the largest.
    *others, decoder = sorted((list(sizes.values()) for sizes in lists.values()), key=sum) or [[0]]
    rest += sum(sum(other) for other in others)
    return Sizes(num_layers, paged(rest), paged(max(decoder)), whole)


def expert_sizes_of(checkpoint: Checkpoint, num_layers: int, item_bytes: int) -> Sizes:
    """As `sizes_of`, of the experts of all layers. Raises ValueError for a model that has none."""
    experts: dict[tuple[int, int], int] = {}
    rest = whole = 0
    for tensor in checkpoint.tensors.values():
        nbytes = tensor.bytes_as(item_bytes)
        whole += nbytes
        layer, expert = _LAYER.match(tensor.name), _EXPERT.search(tensor.name)
        if layer is None or expert is None or int(layer[2]) >= num_layers:
            rest += aligned(nbytes)
            continue
        # One tensor of an expert, or one of all experts of its layer.
        numbers = [int(expert[1])] if expert[1] is not None else range(tensor.shape[0])
        for number in numbers:
            key = int(layer[2]), number
            experts[key] = experts.get(key, 0) + aligned(nbytes // len(numbers))
    if not experts:
        raise ValueError("the model has no experts")
    return Sizes(len(experts), paged(rest), paged(max(experts.values())), whole)


def paged(nbytes: int) -> int:
    """In whole pages, which alone can be given back."""
    return aligned(nbytes, mmap.PAGESIZE)


def _with_slots(num_layers: int, cells: int, slots: int) -> Layout:
    return Layout(num_layers, spread(num_layers, num_layers - cells + slots), slots)
