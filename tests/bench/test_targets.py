from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.bench.baselines import BUS, DISK_BUFFERED, DISK_DIRECT, REGISTER
from mball.bench.page import columns_of, page
from mball.bench.report import Report
from mball.bench.runner import Outcome
from mball.bench.targets import TARGETS, Results
from mball.units import GiB, MiB

SIZE = 15 * GiB


def measured(name: str, first: float, steady: float | None = None, **more: float) -> Outcome:
    """Three rounds at so many GiB/s."""
    rounds = []
    for share in (0.99, 1.0, 1.01):
        measures = {"bytes": float(SIZE), "first_s": 15 / (first * share), **more}
        if steady is not None:
            measures["steady_s"] = 15 / (steady * share)
        rounds.append(measures)
    return Outcome(name, rounds=rounds)


def report(state: str, *outcomes: Outcome, cores: str = "", device: str = "cuda:0", verify: str = "") -> Report:
    setting = {"state": state, "device": device, "cores": cores, "verify": verify}
    return Report("load", setting, f"A {state} load", "mball", "now", {}, {}, {}, list(outcomes), ["A note."])


SMALL = {"vram_extra_bytes": 20.0 * MiB, "host_bytes": 0.5 * GiB, "private_bytes": 1.0}


def good() -> list[Report]:
    return [
        report(
            "warm",
            measured("mball", 30.0, 40.0, **SMALL),
            measured("mball, module", 30.0, 39.0),
            measured("transformers", 5.0, 5.5),
            measured("runai", 5.0, 6.0),
            Outcome("instanttensor", not_run="not installed"),
            measured(BUS, 51.0, 51.0),
        ),
        report("warm", measured("mball", 10.0, 15.0), cores="0,1"),
        report("image", measured("mball, image", 20.0, 49.0), measured(REGISTER, 20.0), measured(BUS, 51.0, 51.0)),
        report(
            "cold",
            measured("mball", 1.2, **SMALL),
            measured("mball, filling its image", 1.2),
            measured("runai", 1.19),
            measured(DISK_DIRECT, 1.2),
            measured(DISK_BUFFERED, 1.1),
        ),
    ]


def verdicts(reports: list[Report]) -> dict[str, tuple[str, str]]:
    results = Results(reports)
    return {target.figure: results.judge(target) for target in TARGETS}


def test_all_reached() -> None:
    found = verdicts(good())
    assert {figure: verdict for figure, (_, verdict) in found.items()} == dict.fromkeys(found, "yes")
    texts = [text for text, _ in found.values()]
    assert any("0.78 × the bus" in text for text in texts)
    assert "6.7 × runai (6.0 GiB/s)" in texts
    assert "83% / 86%" in texts
    assert "0.050 s/GiB" in texts
    assert "20.00 MiB / 20.00 MiB" in texts


def replace(state: str, outcome: Outcome, cores: str = "") -> Callable[[list[Report]], None]:
    def change(reports: list[Report]) -> None:
        for found in reports:
            if (found.setting["state"], found.setting["cores"]) == (state, cores):
                found.outcomes[:] = [outcome if each.name == outcome.name else each for each in found.outcomes]

    return change


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (replace("warm", measured("mball", 30.0, 36.0, **SMALL)), {0, 1}),
        (replace("warm", measured("instanttensor", 10.0, 12.0)), {1}),
        (replace("warm", measured("mball", 20.0, 40.0, **SMALL)), {2}),
        (replace("warm", measured("mball", 10.0, 13.0), cores="0,1"), {3}),
        (replace("image", measured("mball, image", 20.0, 47.0)), {4}),
        (replace("image", measured(BUS, 60.0, 60.0)), {4}),
        (replace("image", measured(REGISTER, 15.0)), {5}),
        (replace("cold", measured("mball", 1.1, **SMALL)), {6, 7}),
        (replace("cold", measured(DISK_BUFFERED, 1.3)), {6}),
        (replace("cold", measured("mball, filling its image", 1.0)), {8}),
        (replace("cold", measured("mball", 1.2, **{**SMALL, "vram_extra_bytes": 65.0 * MiB})), {9}),
        (replace("cold", measured("mball", 1.2, **{**SMALL, "host_bytes": 1.6 * GiB})), {10}),
        (replace("warm", measured("mball", 30.0, 40.0, **{**SMALL, "host_bytes": 0.7 * GiB})), {10}),
        (replace("warm", measured("mball, module", 22.0, 39.0)), {11}),
        (replace("warm", measured("mball, module", 30.0, 36.0)), {11}),
    ],
)
def test_each_can_be_missed(change: Callable[[list[Report]], None], missed: set[int]) -> None:
    reports = good()
    change(reports)
    found = list(verdicts(reports).values())
    assert {number for number, (_, verdict) in enumerate(found) if verdict == "**no**"} == missed


def test_what_was_not_measured_is_said() -> None:
    cpu = report("warm", measured("mball", 30.0, 40.0), device="cpu")
    found = verdicts([cpu, report("warm", measured("mball", 30.0, 40.0), verify="every byte")])
    assert {verdict for _, verdict in found.values()} == {""}
    assert all(text.startswith("not measured") for text, _ in found.values())


def test_a_part_that_was_measured_is_shown_and_judged_alone_when_it_is_wrong() -> None:
    warm = good()[:1]
    found = verdicts(warm)
    assert found["VRAM beyond the weights, at most, warm / cold"] == ("20.00 MiB / not measured", "")
    replace("warm", measured("mball", 30.0, 40.0, **{**SMALL, "vram_extra_bytes": 65.0 * MiB}))(warm)
    found = verdicts(warm)
    assert found["VRAM beyond the weights, at most, warm / cold"] == ("65.00 MiB / not measured", "**no**")


def test_the_page() -> None:
    text = page(good(), {0: Path("/docs/plots/a.svg")}, Path("/docs"))
    assert text.count("| yes |") == len(TARGETS)
    assert "![A warm load](plots/a.svg)" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Loading weights",
        "## A warm load",
        "## A warm load",
        "## A image load",
        "## A cold load",
    ]
    assert "| mball | 0.500 | 30.00 ± 0.30 | 40.00 ± 0.40 | 78% | 20.0 MiB | 512 MiB | 0.0 MiB | 3 |" in text
    assert "instanttensor was not run: not installed." in text
    cold = columns_of(good()[-1])
    assert [column.heading for column in cold] == ["first, s", "first, GiB/s", "beyond", "host", "private", "rounds"]


@given(st.floats(0.1, 100), st.floats(0.1, 100))
def test_ratios(mine: float, bus: float) -> None:
    reports = [report("warm", measured("mball", mine, mine), measured(BUS, bus, bus))]
    text, verdict = Results(reports).judge(TARGETS[0])
    assert f"{mine / bus:.2f} × the bus" in text
    assert (verdict == "yes") == (mine / bus >= 0.72) or abs(mine / bus - 0.72) < 1e-9
