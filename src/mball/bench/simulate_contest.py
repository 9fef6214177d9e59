"""Who takes part in the simulation, over what each is tuned, and runs of all of them, several at once."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from mball.bench.runner import Measures
from mball.bench.simulate_fleet import DISK_BYTES_S, TUNED_ON, Kind, Request, Traffic, fleet, trace
from mball.bench.simulate_mball import Mball
from mball.bench.simulate_rivals import (
    Clairvoyant,
    Evicting,
    Ways,
    first_in_first_out,
    least_recently_used,
    placed,
)
from mball.bench.simulate_world import Policy, World
from mball.memory.settings import Settings

MBALL, CLAIRVOYANT = "MBALL", "clairvoyant"
TUNING_SEEDS = tuple(range(10))
REPORT_SEEDS = tuple(range(100, 110))

Choice = Mapping[str, Any]
"""Values that a contender may be given, by their names in Ways or Settings."""


@dataclass(frozen=True, slots=True)
class Contender:
    """`grid`: every value of each name is tried with every other's, on the tuning seeds. `tuned`: what won there."""

    name: str
    grid: Mapping[str, Sequence[float | bool]]
    tuned: Choice = field(default_factory=dict)

    def choices(self) -> Iterator[Choice]:
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


_COMMON: dict[str, Sequence[float | bool]] = {
    "patience_s": (0.0, 5.0),
    "fill_first": (True, False),
    "one_order": (True, False),
    "overtake": (True, False),
}

CONTENDERS = (
    Contender(
        MBALL,
        {"rate_window_s": (300.0, 600.0, 1200.0), "max_wait_s": (5.0, 15.0), "hold_s": (1.0, 3.0)},
        {"rate_window_s": 1200.0, "max_wait_s": 15.0, "hold_s": 1.0},
    ),
    Contender("LRU", _COMMON, {"patience_s": 5.0, "fill_first": True, "one_order": True, "overtake": False}),
    Contender(
        "FIFO with TTL",
        {**_COMMON, "ttl_s": (60.0, 300.0, 900.0)},
        {"patience_s": 5.0, "fill_first": True, "one_order": True, "overtake": True, "ttl_s": 60.0},
    ),
    Contender(
        "static",
        {**_COMMON, "pinned_share": (0.2, 0.4, 0.6)},
        {"patience_s": 5.0, "fill_first": True, "one_order": False, "overtake": False, "pinned_share": 0.2},
    ),
    Contender(CLAIRVOYANT, {}, {"patience_s": 0.0}),
)


def policy(name: str, choice: Choice, kinds: Sequence[Kind], requests: Sequence[Request]) -> Policy:
    if name == MBALL:
        return Mball(len(kinds), replace(Settings(), **choice))
    ways = Ways(**choice)
    if name == CLAIRVOYANT:
        return Clairvoyant(len(kinds), requests, ways)
    if name == "LRU":
        return Evicting(name, least_recently_used, ways)
    if name == "FIFO with TTL":
        return Evicting(name, first_in_first_out, ways)
    return Evicting(name, least_recently_used, ways, placed(kinds, requests, ways.pinned_share))


def play(name: str, choice: Choice, shape: str, seed: int, traffic: Traffic) -> Measures:
    """One run of one contender."""
    kinds = fleet()
    requests = trace(shape, seed, kinds, traffic)
    result = World(kinds, policy(name, choice, kinds, requests), traffic).run(requests)
    waits = sorted(result.waits)
    # The oldest that is overdue is next: before it go those that waited longer, each with a drain, a start and a load.
    turn_s = result.longest_service_s + max(kind.start_s + kind.weights_bytes / DISK_BYTES_S for kind in kinds) + 1.0
    return {
        "requests": float(len(waits)),
        "mean_s": statistics.fmean(waits),
        "p50_s": quantile(waits, 0.5),
        "p99_s": quantile(waits, 0.99),
        "longest_s": waits[-1],
        "longest_bound_s": Settings().max_wait_s + (1 + result.most_waiting) * turn_s,
        "switching_share": result.switching_share,
        "promotions": float(result.promotions),
        "starts": float(result.starts),
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least of them that `share` of all do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -int(-len(ordered) * share // 1) - 1))]


Job = tuple[str, Choice, str, int, Traffic]


def play_all(jobs: Sequence[Job], progress: Callable[[int], object] = lambda done: None) -> list[Measures]:
    """In as many processes as there are cores."""
    found = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as processes:
        for result in processes.map(_play, jobs, chunksize=4):
            found.append(result)
            progress(len(found))
    return found


def tune(
    contender: Contender, traffic: Traffic, seeds: Sequence[int], progress: Callable[[int], object] = lambda done: None
) -> Contender:
    """The choice with the lowest p99, averaged over the tuning traces and seeds; the first of equal ones."""
    choices = list(contender.choices())
    cases = [(shape, seed) for shape in TUNED_ON for seed in seeds]
    jobs = [(contender.name, choice, shape, seed, traffic) for choice in choices for shape, seed in cases]
    results = iter(play_all(jobs, progress))
    scores = [statistics.fmean(next(results)["p99_s"] for _ in cases) for _ in choices]
    best = min(range(len(choices)), key=lambda number: scores[number])
    return replace(contender, tuned=choices[best])


def _play(job: Job) -> Measures:
    return play(*job)
