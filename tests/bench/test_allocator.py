"""The allocator's benchmark, small: real workers on a pretended device, and a pretended vLLM."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from rich.console import Console

from mball.bench import allocator_peers
from mball.bench.allocator import Killed, Options, Together, switches
from mball.bench.allocator_report import run_allocator
from mball.device.simulated import SimulatedDevice
from mball.errors import MballError
from mball.server.models import random as random_models
from mball.units import GiB, MiB

VLLM = """
import sys, json, http.server
sys.argv.remove("--enforce-eager")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if {fails}:
    print("INFO starting", file=sys.stderr)
    raise ValueError("Free memory on device is less than desired")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
assert float(options["--gpu-memory-utilization"]) == 0.25, options
http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def _logging_comes_back() -> Iterator[None]:
    """The benchmark silences it for its process, which here goes on."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    random_models.make("llama", tmp_path / "model", size_bytes=8 * MiB, seed=1, dtype="float32")
    SimulatedDevice.create(tmp_path / "gpu", 400 * MiB, context_bytes=1 * MiB)
    return Options(
        tmp_path / "model",
        tmp_path / "model",
        f"simulated:{tmp_path / 'gpu'}",
        share_bytes=100 * MiB,
        kv_bytes=16 * MiB,
        dram_bytes=256 * MiB,
        kills=2,
        switches=4,
    )


def test_every_stage_is_measured_and_judged(options: Options, tmp_path: Path) -> None:
    run_allocator(
        options, vllm=None, json_path=tmp_path / "a.json", markdown_path=tmp_path / "a.md", console=Console(quiet=True)
    )
    written = json.loads((tmp_path / "a.json").read_text())
    results, verdicts = written["results"], {check["name"]: check["holds"] for check in written["checks"]}
    assert len(results["together"]["ready_s"]) == len(results["together"]["held_bytes"]) == 4
    assert results["together"]["failures"] == []
    assert len(results["killed"]["promised_s"]) == len(results["killed"]["shown_s"]) == 2
    assert results["killed"]["held_bytes"] > 8 * MiB
    assert len(results["switches"]["alone_s"]) == 4
    assert results["switches"]["beside_s"]
    # The last is of time alone, which two cores shared with other tests don't promise.
    assert list(verdicts.values())[:3] == [True] * 3
    assert "| what | measured | promised | |" in (tmp_path / "a.md").read_text()


async def test_models_that_fit_together_are_no_switch(options: Options) -> None:
    with pytest.raises(MballError, match="nothing was switched"):
        await switches(dataclasses.replace(options, switches=2), 250 * MiB)


def test_collisions_and_the_time_after_the_device_showed_the_bytes() -> None:
    assert Together(failures=["a"], over_bytes=1 * GiB).collisions() == 2
    assert Together(over_bytes=10 * MiB).collisions() == 0
    assert Killed(shown_s=[1.0, 2.0], promised_s=[1.5, 1.75]).after_s == [0.5, 0.0]


@pytest.mark.parametrize("fails", [False, True])
async def test_servers_that_fail_and_those_that_answer_are_told_apart(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(VLLM.format(fails=fails))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    found = await allocator_peers.vllm_together(dataclasses.replace(options, together=2), Path(sys.executable))
    assert len(found.ready_s) == (0 if fails else 2)
    assert len(found.failures) == found.collisions() == (2 if fails else 0)
    assert all("ValueError: Free memory on device" in failure for failure in found.failures)
