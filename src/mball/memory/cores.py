"""Which cores compute for whom, so that workers do not fight over them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Topology:
    """The cores that may be used, by NUMA node. `limit`: how many may be busy at once (a container's quota)."""

    nodes: tuple[tuple[int, ...], ...]
    limit: int | None = None

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for node in self.nodes for cpu in node))


@dataclass(frozen=True, slots=True)
class Resident:
    """A model whose worker lives. `threads` is how many it would like to compute on; `active`: it is computing."""

    name: str
    threads: int
    active: bool


@dataclass(frozen=True, slots=True)
class Cores:
    """Where a worker may run, and on how many threads it computes."""

    cpus: tuple[int, ...]
    threads: int

    def as_dict(self) -> dict[str, Any]:
        return {"cpus": list(self.cpus), "threads": self.threads}


def share(topology: Topology, residents: Sequence[Resident]) -> dict[str, Cores]:
    """Those that compute get cores of their own, as many as they like where there are enough, else fair shares, on one
    node where one has them; what is left over is spread among them, for what else a worker does. More than there are
    cores take turns on single ones. Those at rest may run anywhere: they do nothing, and the first to begin is not held
    up.
    """
    cpus = topology.cpus
    busy = min(len(cpus), topology.limit or len(cpus))
    given = {r.name: Cores(cpus, max(1, min(r.threads, busy))) for r in residents if not r.active}
    active = sorted((r for r in residents if r.active), key=lambda r: r.name)
    if not active:
        return given
    if len(active) >= busy:
        turns = (cpus[number % busy] for number in range(len(active)))
        return given | {r.name: Cores((cpu,), 1) for r, cpu in zip(active, turns, strict=True)}
    grants = _fair(active, busy)
    free = [list(node) for node in topology.nodes]
    places = {r.name: _place(free, grants[r.name]) for r in sorted(active, key=lambda r: (-grants[r.name], r.name))}
    for cpu, home in [(cpu, node) for node, left in zip(topology.nodes, free, strict=True) for cpu in left]:
        nearest = min(active, key=lambda r: (not set(places[r.name]) & set(home), len(places[r.name]), r.name))
        places[nearest.name].append(cpu)
    return given | {r.name: Cores(tuple(sorted(places[r.name])), grants[r.name]) for r in active}


def _fair(active: Sequence[Resident], cpus: int) -> dict[str, int]:
    """One core after the other to each that wants more, so that nobody has more than he wants or two more than another
    who wants them."""
    grants = {r.name: 1 for r in active}
    left = cpus - len(active)
    while left and (wanting := [r for r in active if grants[r.name] < r.threads]):
        for resident in wanting[:left]:
            grants[resident.name] += 1
        left -= len(wanting[:left])
    return grants


def _place(free: list[list[int]], count: int) -> list[int]:
    """Takes that many cores: of the fullest node that has as many, else of the emptiest first."""
    enough = [node for node in free if len(node) >= count]
    if enough:
        node = min(enough, key=len)
        taken, node[:count] = node[:count], []
        return taken
    taken = []
    for node in sorted(free, key=len, reverse=True):
        part = min(count - len(taken), len(node))
        taken += node[:part]
        node[:part] = []
    return taken
