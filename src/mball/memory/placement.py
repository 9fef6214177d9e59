"""Which device a model goes to, or which devices: those where its coming costs the others least. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mball.memory.planner import Demand, Move, Snapshot, plan


@dataclass(frozen=True, slots=True)
class Placement:
    """Devices by their number in the order given, and the moves that each needs first.

    A model that spreads over several devices is moved on all of them at once: its move stands for each of its devices.
    """

    devices: tuple[int, ...]
    moves: tuple[list[Move], ...]

    @property
    def cost(self) -> float:
        """Each moved model counts once, at the dearest of what is asked of it."""
        dearest: dict[str, float] = {}
        for move in itertools.chain.from_iterable(self.moves):
            dearest[move.model] = max(dearest.get(move.model, 0.0), move.cost)
        return sum(dearest.values())


def place(devices: Sequence[Snapshot], demand: Demand, *, tensor_parallel_size: int = 1) -> Placement | None:
    """The cheapest set of `tensor_parallel_size` devices, each of which gives the demand's `nbytes`; None where there
    is none yet.

    `nbytes` are per device, `dram_bytes` in all, and DRAM is the same for every device. Equal ones: where nothing has
    to move, the tightest fit, which leaves the larger room for the larger model; then the lower numbers.
    """
    plans = [plan(snapshot, demand) for snapshot in devices]
    able = [number for number, moves in enumerate(plans) if moves is not None]
    found = [
        _placement(devices, demand, chosen, plans) for chosen in itertools.combinations(able, tensor_parallel_size)
    ]
    return min(found, key=lambda placed: (placed.cost, _spare(devices, placed), placed.devices), default=None)


def _placement(
    devices: Sequence[Snapshot], demand: Demand, chosen: tuple[int, ...], alone: Sequence[list[Move] | None]
) -> Placement:
    """Device after device: what a model that was moved for one frees on the next is free there already."""
    moves: list[list[Move]] = []
    for number in chosen:
        before = {move.model: move for move in itertools.chain.from_iterable(moves)}
        whole = alone[number] or []
        if not before:
            moves.append(whole)
            continue
        snapshot = devices[number]
        rest = replace(
            snapshot,
            free_bytes=snapshot.free_bytes + sum(_frees(snapshot, move) for move in before.values()),
            candidates=tuple(c for c in snapshot.candidates if c.name not in before),
        )
        further = plan(rest, replace(demand, dram_bytes=0))
        # None: what was moved before has to give more here than it does there.
        moves.append([move for move in whole if move.kind != "drop"] if further is None else further)
    return Placement(chosen, tuple(moves))


def _frees(snapshot: Snapshot, move: Move) -> int:
    """What a move that was planned on another device frees on this one."""
    c = next((c for c in snapshot.candidates if c.name == move.model), None)
    if c is None or move.kind == "drop":
        return 0
    if move.kind == "balloon":
        return c.balloon_bytes
    if move.kind == "layers":
        return min(move.frees_bytes, c.balloon_bytes + c.layer_bytes)
    return c.demote_bytes + (c.stop_bytes if move.kind == "stop" else 0)


def _spare(devices: Sequence[Snapshot], placed: Placement) -> int:
    return sum(devices[number].free_bytes for number in placed.devices)
