from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from mball.bench.gateway import MOST, TIMES, Settings, run_gateway, verdicts
from mball.bench.gateway_servers import BARE, DIRECT, LITELLM, MBALL
from mball.bench.report import Report, from_json
from mball.bench.runner import Outcome
from mball.errors import ConfigError


def test_a_small_run(tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    settings = Settings(None, seconds=0.2, windows=1, rate=20, streams=8, growth=20, rounds=1)
    run_gateway(settings, json_path=out, markdown_path=page, console=Console(quiet=True))
    (report,) = from_json(out.read_text())
    assert [(outcome.name, outcome.not_run) for outcome in report.outcomes] == [
        (name, None) for name in (DIRECT, MBALL, BARE)
    ]
    direct, mine, bare = (outcome.rounds[0] for outcome in report.outcomes)
    assert direct.keys() == TIMES.keys()
    assert bare.keys() >= TIMES.keys() | {"added_p50_ms", "first_p99_ms"}
    assert "a uvicorn that forwards and does nothing else, added, p50, ms: " in page.read_text()
    assert mine.keys() >= TIMES.keys() | {"stream_kib", "growth_mib"}
    assert all(mine[name] > 0 for name in TIMES)
    assert "JSON, 1 connection: not compared" in page.read_text()


def report(mine: dict[str, float], peer: dict[str, float]) -> Report:
    outcomes = [Outcome(MBALL, rounds=[mine]), Outcome(LITELLM, rounds=[peer])]
    return Report("gateway", {}, "", "", "", {}, {}, {}, outcomes, [])


def test_what_is_wanted_is_judged() -> None:
    peer = dict.fromkeys(TIMES, 10.0)
    rates = {name: 10.0 * times for name, times in TIMES.items()}
    good = verdicts(report({**rates, **MOST}, peer))
    assert [line.rpartition(": ")[2] for line in good] == ["reached"] * 10
    bad = verdicts(
        report({name: value * 0.9 for name, value in rates.items()} | {n: v * 1.1 for n, v in MOST.items()}, peer)
    )
    assert [line.rpartition(": ")[2] for line in bad] == ["not reached"] * 10
    assert verdicts(report(rates, peer))[-1].endswith("not measured")
    beside = report({**rates, "json_1_rps": 2000.0}, peer)
    beside.outcomes.append(Outcome(DIRECT, rounds=[{"json_1_rps": 10_000.0}]))
    assert verdicts(beside)[-1].endswith(": 0.40 ms")


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError):
        Settings(rate=0).check()


def test_a_peer_that_can_t_be_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    from mball.bench.contenders import Cannot
    from mball.bench.gateway_servers import install_litellm

    with pytest.raises(Cannot, match="pip can't install litellm"):
        install_litellm(tmp_path / "venv")
