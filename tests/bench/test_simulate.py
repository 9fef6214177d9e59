from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from mball.bench import simulate_mball
from mball.bench.report import Report, from_json
from mball.bench.runner import Outcome
from mball.bench.simulate import Simulation, run_simulation
from mball.bench.simulate_contest import CONTENDERS, Contender, play, policy, quantile, tune
from mball.bench.simulate_fleet import CONTEXT_BYTES, DEVICE_BYTES, TRACES, TUNED_ON, Request, Traffic, fleet, trace
from mball.bench.simulate_mball import Mball
from mball.bench.simulate_page import Interval, verdicts
from mball.bench.simulate_rivals import Evicting, Ways, least_recently_used, placed
from mball.bench.simulate_world import SimModel, World
from mball.errors import ConfigError, TransitionError
from mball.memory import policy as live
from mball.memory.settings import Settings

SHORT = Traffic(rate=0.3, length_s=900.0, warm_s=100.0)


def test_mball_is_the_policy_that_the_scheduler_runs() -> None:
    assert simulate_mball.decide is live.decide
    assert simulate_mball.image_drops is live.image_drops


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_keeps_to_its_rate_and_is_the_same_for_the_same_seed(name: str) -> None:
    kinds, traffic = fleet(), Traffic(rate=0.5, length_s=4000.0)
    requests = [trace(name, seed, kinds, traffic) for seed in range(3)]
    assert requests[0] == trace(name, 0, kinds, traffic)
    assert requests[0] != requests[1]
    assert sum(map(len, requests)) == pytest.approx(3 * 0.5 * 4000, rel=0.3)
    times = [request.at_s for request in requests[0]]
    assert times == sorted(times)
    assert times[-1] < 4000


def test_steady_requests_follow_zipf() -> None:
    counts = Counter(request.model for request in trace("steady", 3, fleet(), Traffic(rate=2.0, length_s=20_000.0)))
    shares = [count for _, count in counts.most_common()]
    assert shares[0] / shares[1] == pytest.approx(2.0, rel=0.1)
    assert shares[0] / shares[9] == pytest.approx(10.0, rel=0.2)


def test_all_models_asleep_and_the_largest_awake_fit_the_device_alone_but_not_together() -> None:
    kinds = fleet()
    assert len(kinds) == 24
    assert len(kinds) * CONTEXT_BYTES < DEVICE_BYTES
    assert max(kind.needed_bytes for kind in kinds) < DEVICE_BYTES
    assert max(kind.needed_bytes for kind in kinds) + 23 * CONTEXT_BYTES > DEVICE_BYTES


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_everyone_answers_every_request_within_the_device(contender: Contender) -> None:
    for name in TRACES:
        found = play(contender.name, contender.tuned, name, 1, SHORT)
        counted = [request for request in trace(name, 1, fleet(), SHORT) if request.at_s >= SHORT.warm_s]
        assert found["requests"] == len(counted)
        assert 0 <= found["mean_s"] <= found["longest_s"]
        assert found == play(contender.name, contender.tuned, name, 1, SHORT)


def test_one_request_takes_a_start_and_a_read_of_the_disk_and_the_next_nothing() -> None:
    kinds, traffic = fleet(), Traffic(warm_s=0.0)
    kind = kinds[15]
    requests = [Request(1.0, 15, 2.0), Request(100.0, 15, 2.0)]
    for name in ("MBALL", "LRU", "clairvoyant"):
        waits = World(kinds, policy(name, {}, kinds, requests), traffic).run(requests).waits
        assert waits[0] == pytest.approx(kind.start_s + kind.source_s, rel=0.1)
        assert waits[1] == 0.0


def test_a_policy_that_promises_more_than_the_device_has_is_found_out() -> None:
    class Greedy(Evicting):
        def step(self, world: World, now: float) -> float:
            for model in world.models:
                if not model.alive and not model.moving:
                    world.start(model)
                elif not model.on_device and not model.moving and not world.busy:
                    world.bring(model, demote=[], stop=[])
            return float("inf")

    kinds = fleet()
    with pytest.raises(TransitionError, match="exceeds the device"):
        World(kinds, Greedy("greedy", least_recently_used, Ways()), SHORT).run(trace("steady", 0, kinds, SHORT))


def test_a_policy_that_moves_what_is_in_use_is_found_out() -> None:
    class Rude(Evicting):
        def step(self, world: World, now: float) -> float:
            busy: list[SimModel] = [model for model in world.models if model.inside]
            if busy and not world.busy:
                world.demote(busy[0])
            return super().step(world, now)

    kinds = fleet()
    with pytest.raises(TransitionError, match="in use"):
        World(kinds, Rude("rude", least_recently_used, Ways()), SHORT).run(trace("steady", 0, kinds, SHORT))


def test_a_policy_that_never_serves_is_found_out() -> None:
    class Idle(Evicting):
        def step(self, world: World, now: float) -> float:
            return float("inf")

    kinds = fleet()
    with pytest.raises(TransitionError, match="never served"):
        World(kinds, Idle("idle", least_recently_used, Ways()), SHORT).run(trace("steady", 0, kinds, SHORT))


def test_switching_keeps_to_its_share_under_overload() -> None:
    kinds, crowd = fleet(), Traffic(rate=1.5, length_s=1200.0, warm_s=100.0)
    requests = trace("steady", 0, kinds, crowd)
    settings = Settings()
    result = World(kinds, Mball(len(kinds), settings), crowd).run(requests)
    assert result.switching_share <= settings.swap_time_share


def test_a_place_of_its_own_goes_to_most_requests_a_byte() -> None:
    kinds = fleet()
    often = {0: 9, 15: 9, 23: 9, 1: 1}
    requests = [Request(float(at), model, 1.0) for model, times in often.items() for at in range(times)]
    assert placed(kinds, requests, 0.06) == [0]
    assert placed(kinds, requests, 0.12) == [0, 1]
    assert placed(kinds, requests, 0.5) == [0, 15, 1]


def test_an_interval_holds_its_mean() -> None:
    values = [3.0, 4.0, 5.0, 9.0]
    interval = Interval.of(values)
    assert interval.low < interval.mean == statistics.fmean(values) < interval.high
    assert Interval.of([2.0] * 5) == Interval(2.0, 2.0, 2.0)


def test_quantiles() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert (quantile(ordered, 0.99), quantile(ordered, 0.5), quantile([7.0], 0.99)) == (99.0, 50.0, 7.0)


def report(name: str, **p99: float) -> Report:
    outcomes = [Outcome(who, {}, [{"p99_s": value}]) for who, value in p99.items()]
    return Report("simulate", {"trace": name}, name, "", "", {}, {}, {}, outcomes, [])


def test_the_verdict_asks_for_the_average_and_for_every_trace() -> None:
    won = verdicts([report("x", MBALL=5.0, LRU=10.0, clairvoyant=1.0), report("y", MBALL=10.4, LRU=10.0)])
    assert [(against.rival, against.won) for against in won] == [("LRU", True)]
    assert not verdicts([report("x", MBALL=5.0, LRU=10.0), report("y", MBALL=10.6, LRU=10.0)])[0].won
    assert not verdicts([report("x", MBALL=10.2, LRU=10.0), report("y", MBALL=10.2, LRU=10.0)])[0].won


def test_tuning_takes_the_choice_with_the_lowest_p99() -> None:
    contender, traffic = Contender("LRU", {"fill_first": (True, False), "one_order": (True, False)}), SHORT
    scores = {
        tuple(choice.items()): statistics.fmean(
            play("LRU", choice, shape, seed, traffic)["p99_s"] for shape in TUNED_ON for seed in (0, 1)
        )
        for choice in contender.choices()
    }
    assert len(set(scores.values())) > 1
    assert tune(contender, traffic, [0, 1]).tuned == dict(min(scores, key=lambda choice: scores[choice]))


def test_the_command_writes_a_table_a_plot_a_page_and_every_run(tmp_path: Path) -> None:
    simulation = Simulation(traces=("steady", "heavy-tailed"), seeds=2, minutes=8.0)
    page, data = tmp_path / "simulate.md", tmp_path / "simulate.json"
    console = Console(record=True, width=120)
    run_simulation(simulation, json_path=data, plot_path=None, markdown_path=page, console=console)
    reports = from_json(data.read_text())
    assert json.loads(data.read_text())["schema_version"]
    assert [found.setting["trace"] for found in reports] == ["steady", "heavy-tailed"]
    names = [contender.name for contender in CONTENDERS]
    assert [outcome.name for outcome in reports[0].outcomes] == names
    assert all(len(outcome.rounds) == 2 for outcome in reports[0].outcomes)
    text = page.read_text()
    assert "mball bench simulate --traces steady,heavy-tailed --seeds 2 --minutes 8" in text
    for name in names:
        assert f"| {name} |" in text
    assert "bound 20%" in text
    assert (tmp_path / "simulate.svg").stat().st_size > 1000
    assert (tmp_path / "simulate.png").stat().st_size > 1000
    assert "p99 against LRU" in console.export_text()


def test_an_unknown_trace_is_named() -> None:
    with pytest.raises(ConfigError, match="no lunar"):
        Simulation(traces=("lunar",)).check()


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_mball_is_ahead_of_every_rival_on_seeds_and_a_trace_that_nobody_was_tuned_on() -> None:
    console = Console(quiet=True)
    reports = run_simulation(Simulation(), json_path=None, plot_path=None, markdown_path=None, console=console)
    assert all(against.won for against in verdicts(reports)), [str(against) for against in verdicts(reports)]
    for found in reports:
        ours = found.outcome("MBALL")
        assert ours is not None
        assert max(run["switching_share"] for run in ours.rounds) <= Settings().swap_time_share
        assert all(run["longest_s"] <= run["longest_bound_s"] for run in ours.rounds)


def test_mball_runs_with_the_settings_that_are_served() -> None:
    tuned = next(contender.tuned for contender in CONTENDERS if contender.name == "MBALL")
    assert {name: getattr(Settings(), name) for name in tuned} == tuned
