"""What the loader is meant to reach on one H100, and whether results of `mball bench load` reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mball.bench.baselines import BUS, DISK_BUFFERED, DISK_DIRECT, REGISTER
from mball.bench.contenders import PEERS
from mball.bench.report import Report, Spread
from mball.bench.runner import Outcome
from mball.units import GiB, MiB

Verdict = tuple[str, bool | None]
"""What was reached, in words, and whether that is what was wanted; None where a part of it wasn't measured."""

_FIRST_S_PER_GIB = 0.6 / 15


class Unmeasured(Exception):
    """The results lack what a figure is made of."""


@dataclass(frozen=True, slots=True)
class Target:
    figure: str
    wanted: str
    judge: Callable[[Results], Verdict]


class Results:
    """Reports by their setting: those from a GPU, without verification."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self._reports = [
            report for report in reports if report.setting["device"] != "cpu" and not report.setting["verify"]
        ]

    def judge(self, target: Target) -> tuple[str, str]:
        """Reached, and `yes`, `no` or nothing where it wasn't measured."""
        try:
            reached, good = target.judge(self)
        except Unmeasured as error:
            return f"not measured: {error}", ""
        return reached, {True: "yes", False: "**no**", None: ""}[good]

    def outcome(self, state: str, name: str, *, few_cores: bool = False) -> Outcome:
        for report in self._reports:
            if report.setting["state"] == state and bool(report.setting["cores"]) == few_cores:
                found = report.outcome(name)
                if found is not None:
                    return found
        raise Unmeasured(f"{name}, {state}")

    def rate(self, state: str, name: str, measure: str, *, few_cores: bool = False) -> Spread:
        """GiB/s."""
        rounds = self.outcome(state, name, few_cores=few_cores).rounds
        found = [measures["bytes"] / GiB / measures[measure] for measures in rounds if measure in measures]
        if not found:
            raise Unmeasured(f"{measure} of {name}, {state}")
        return Spread.of(found)

    def peers(self, state: str, measure: str) -> dict[str, float]:
        """Medians of all peers that were measured, GiB/s."""
        found = {}
        for name in PEERS:
            try:
                found[name] = self.rate(state, name, measure).median
            except Unmeasured:
                continue
        if not found:
            raise Unmeasured(f"any peer, {state}")
        return found

    def most(self, state: str, measure: str) -> float | None:
        """The largest of MBALL's rounds; None where there are none."""
        try:
            return max(measures[measure] for measures in self.outcome(state, "mball").rounds)
        except (Unmeasured, KeyError):
            return None


def _warm_bus(results: Results) -> Verdict:
    mine, bus = results.rate("warm", "mball", "steady_s"), results.rate("warm", BUS, "steady_s")
    share = mine.median / bus.median
    return f"{mine} GiB/s, {share:.2f} × the bus ({bus})", share >= 0.72


def _warm_peer(results: Results) -> Verdict:
    mine, peers = results.rate("warm", "mball", "steady_s").median, results.peers("warm", "steady_s")
    best = max(peers, key=lambda name: peers[name])
    times = mine / peers[best]
    return f"{times:.1f} × {best} ({peers[best]:.1f} GiB/s)", times >= 6.5


def _warm_first(results: Results) -> Verdict:
    rounds = results.outcome("warm", "mball").rounds
    seconds = Spread.of([measures["first_s"] for measures in rounds])
    size = rounds[0]["bytes"] / GiB
    return f"{seconds} s for {size:.1f} GiB", seconds.median <= _FIRST_S_PER_GIB * size


def _few_cores(results: Results) -> Verdict:
    mine = results.rate("warm", "mball", "steady_s", few_cores=True)
    return f"{mine} GiB/s", mine.median >= 14


def _image(results: Results) -> Verdict:
    mine, bus = results.rate("image", "mball, image", "steady_s"), results.rate("image", BUS, "steady_s")
    share = mine.median / bus.median
    return f"{mine} GiB/s, {share:.2f} × the bus ({bus})", mine.median >= 48 and share >= 0.94


def _registration(results: Results) -> Verdict:
    cost = 1 / results.rate("image", REGISTER, "first_s").median
    return f"{cost:.3f} s/GiB", cost <= 0.06


def _raw(results: Results) -> Spread:
    found = []
    for name in (DISK_DIRECT, DISK_BUFFERED):
        try:
            found.append(results.rate("cold", name, "first_s"))
        except Unmeasured:
            continue
    if not found:
        raise Unmeasured("the disk")
    return max(found, key=lambda spread: spread.median)


def _cold_raw(results: Results) -> Verdict:
    mine, raw = results.rate("cold", "mball", "first_s"), _raw(results)
    share = mine.median / raw.median
    return f"{mine} GiB/s, {share:.2f} × the raw read ({raw})", share >= 0.95


def _cold_peers(results: Results) -> Verdict:
    mine, peers = results.rate("cold", "mball", "first_s"), results.peers("cold", "first_s")
    best = max(peers, key=lambda name: peers[name])
    behind = peers[best] - mine.median
    return f"{mine.median:.2f} GiB/s, {best} {peers[best]:.2f}", behind <= _raw(results).iqr


def _cold_image(results: Results) -> Verdict:
    filling = results.rate("cold", "mball, filling its image", "first_s")
    cold = results.rate("cold", "mball", "first_s")
    return f"{filling} GiB/s, without {cold}", filling.median >= cold.median - max(cold.iqr, _raw(results).iqr)


def _vram(results: Results) -> Verdict:
    return _at_most(results, "vram_extra_bytes", (64 * MiB, 64 * MiB), MiB, "MiB")


def _host(results: Results) -> Verdict:
    return _at_most(results, "host_bytes", (6 * GiB // 10, 3 * GiB // 2), GiB, "GiB")


def _at_most(results: Results, measure: str, bounds: tuple[int, int], unit: int, name: str) -> Verdict:
    """The peaks of warm and cold."""
    found = [results.most(state, measure) for state in ("warm", "cold")]
    texts = [f"{most / unit:.2f} {name}" if most is not None else "not measured" for most in found]
    good = [most <= bound for most, bound in zip(found, bounds, strict=True) if most is not None]
    return " / ".join(texts), False if not all(good) else True if len(good) == len(found) else None


def _cut(results: Results) -> Verdict:
    cuts = []
    for measure in ("first_s", "steady_s"):
        mine = results.rate("warm", "mball, module", measure).median
        cuts.append(1 - results.rate("warm", "transformers", measure).median / mine)
    return f"{cuts[0]:.0%} / {cuts[1]:.0%}", cuts[0] >= 0.78 and cuts[1] >= 0.85


TARGETS = (
    Target("warm page cache → VRAM, steady", "≥ 0.72 × the bus (40 GiB/s is the aim)", _warm_bus),
    Target("warm, steady, against the best peer", "≥ 6.5 ×", _warm_peer),
    Target("warm, first call", "≤ 0.6 s for 15 GiB", _warm_first),
    Target("warm on two cores, steady", "≥ 14 GiB/s (18 is the aim)", _few_cores),
    Target("DRAM image → VRAM, registered", "≥ 48 GiB/s, ≥ 0.94 × the bus", _image),
    Target("registering the image, on its own", "≤ 0.06 s/GiB", _registration),
    Target("cold → VRAM", "≥ 0.95 × the raw read", _cold_raw),
    Target("cold, against the best peer", "not behind by more than the raw read's spread", _cold_peers),
    Target("cold while the image is filled", "no slower than cold", _cold_image),
    Target("VRAM beyond the weights, at most, warm / cold", "≤ 64 MiB", _vram),
    Target("host memory beyond the page cache, at most, warm / cold", "≤ 0.6 / 1.5 GiB", _host),
    Target("load time cut against from_pretrained, warm, first / steady", "≥ 78 % / ≥ 85 %", _cut),
)
