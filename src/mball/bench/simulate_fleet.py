"""The models that the simulator serves, what moving them costs, and who asks for them when."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mball.units import GiB

CONTEXT_BYTES = round(1.9 * GiB)
DEVICE_BYTES = 80 * 10**9
DRAM_BYTES = 224 * GiB
BUS_BYTES_S = 48.0 * GiB
DISK_BYTES_S = 1.2 * GiB
CACHED_BYTES_S = 10.0 * GiB
MOVE_S = 0.15
"""What a promotion takes beside the copy: the canary token and the proof."""
DEMOTE_S = 0.05
STOP_S = 0.5
SLOTS = 16
"""Requests that one model serves at once."""

BILLIONS = (1, 1, 1, 1, 1.5, 1.5, 3, 3, 3, 3, 4, 4, 7, 7, 7, 8, 8, 8, 8, 14, 14, 14, 24, 32)
"""24 models, by their parameters in billions, two bytes each."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A model as it is, before anything happens."""

    name: str
    weights_bytes: int
    kv_bytes: int
    start_s: float
    service_s: float

    @property
    def needed_bytes(self) -> int:
        return CONTEXT_BYTES + self.weights_bytes + self.kv_bytes

    @property
    def image_s(self) -> float:
        """Promoting it from its image."""
        return MOVE_S + self.weights_bytes / BUS_BYTES_S

    @property
    def source_s(self) -> float:
        """Promoting it from the disk."""
        return MOVE_S + self.weights_bytes / DISK_BYTES_S


def fleet() -> list[Kind]:
    """Names say the size; starts take 4 to 9 seconds, answers 0.8 to 7 on average."""
    kinds = []
    for number, billions in enumerate(BILLIONS):
        weights = round(billions * 2e9)
        kv = round(max(0.5, min(4.0, billions / 4)) * GiB)
        name = f"{number:02}-{billions:g}B"
        kinds.append(Kind(name, weights, kv, 4.0 + billions * 0.15, 0.6 + billions * 0.2))
    return kinds


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    model: int
    service_s: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """`rate` requests a second over all models on average, for `length_s`; those of the first `warm_s` do not count."""

    rate: float = 0.3
    length_s: float = 4500.0
    warm_s: float = 900.0
    skew: float = 1.0


Draw = Callable[[random.Random], float]
Weights = Callable[[float], list[float]]
"""How the requests of a moment are shared out among the models; their sum says how many there are (1: the mean)."""


def trace(name: str, seed: int, kinds: list[Kind], traffic: Traffic) -> list[Request]:
    """Requests in the order of their arrival, the same for the same name and seed."""
    rng = random.Random(f"{name} {seed}")
    return list(_arrivals(rng, TRACES[name](rng, len(kinds), traffic), kinds, traffic))


def _arrivals(rng: random.Random, weights: Weights, kinds: list[Kind], traffic: Traffic) -> Iterator[Request]:
    """By thinning a steady stream, so that every shape keeps to its weights at each moment."""
    peak, now = 6.0, 0.0
    while (now := now + rng.expovariate(traffic.rate * peak)) < traffic.length_s:
        shares = weights(now)
        if rng.random() * peak > sum(shares):
            continue
        model = rng.choices(range(len(kinds)), shares)[0]
        yield Request(now, model, kinds[model].service_s * rng.lognormvariate(-0.18, 0.6))


def _ranks(rng: random.Random, number: int, skew: float) -> list[float]:
    """Zipf's shares, dealt out to the models by chance."""
    shares = [1 / rank**skew for rank in range(1, number + 1)]
    rng.shuffle(shares)
    return [share / sum(shares) for share in shares]


def _steady(rng: random.Random, number: int, traffic: Traffic) -> Weights:
    shares = _ranks(rng, number, traffic.skew)
    return lambda now: shares


def _bursty(rng: random.Random, number: int, traffic: Traffic) -> Weights:
    """Each model is asked for in bursts of a minute or so, five times as often as on average, and hardly in between."""
    base = _ranks(rng, number, traffic.skew)
    switches = [
        _on_off(rng, traffic.length_s, lambda r: r.expovariate(1 / 60), lambda r: r.expovariate(1 / 240)) for _ in base
    ]
    return lambda now: [
        share * (4.6 if _is_on(times, now) else 0.1) for share, times in zip(base, switches, strict=True)
    ]


def _shifting(rng: random.Random, number: int, traffic: Traffic) -> Weights:
    """Every ten minutes the most asked for are others."""
    spans = [_ranks(rng, number, traffic.skew) for _ in range(math.ceil(traffic.length_s / 600))]
    return lambda now: spans[int(now / 600)]


def _heavy(rng: random.Random, number: int, traffic: Traffic) -> Weights:
    """On and off for times without a typical length (Pareto), over a tide that rises and falls."""
    base = _ranks(rng, number, traffic.skew)

    def span(mean: float) -> Draw:
        return lambda r: mean / 3 * r.paretovariate(1.5)

    switches = [_on_off(rng, traffic.length_s, span(90), span(270)) for _ in base]

    def weights(now: float) -> list[float]:
        tide = 1 + 0.5 * math.sin(2 * math.pi * now / 1800)
        return [
            tide * share * (3.7 if _is_on(times, now) else 0.1) for share, times in zip(base, switches, strict=True)
        ]

    return weights


TRACES: dict[str, Callable[[random.Random, int, Traffic], Weights]] = {
    "steady": _steady,
    "bursty": _bursty,
    "shifting": _shifting,
    "heavy-tailed": _heavy,
}
TUNED_ON = ("steady", "bursty", "shifting")


def _on_off(rng: random.Random, length_s: float, on: Draw, off: Draw) -> list[float]:
    """When it turns on, off, on…, from some moment before 0."""
    times, now = [], -off(rng) * rng.random()
    while now < length_s:
        now += off(rng)
        times.append(now)
        now += on(rng)
        times.append(now)
    return times


def _is_on(times: list[float], now: float) -> bool:
    from bisect import bisect_right

    return bisect_right(times, now) % 2 == 1
