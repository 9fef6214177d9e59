from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mball.server.engine_path import search_path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import importlib.metadata, json, sys, mball
points = importlib.metadata.entry_points(group="vllm.general_plugins")
others = [name for name in ("torch", "pydantic", "structlog") if name in sys.modules]
print(json.dumps([mball.__file__, {point.name: point.value for point in points}, others]))
"""


def test_an_interpreter_without_mball_has_it_and_its_plugins(tmp_path: Path) -> None:
    for _ in range(2):
        path = search_path(tmp_path / "path")
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    file, points, others = json.loads(done.stdout)
    assert Path(file).is_relative_to(tmp_path)
    assert (
        points
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    )
    assert not others


def test_what_was_on_the_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/one:/two")
    assert search_path(tmp_path / "path") == f"{tmp_path}/path:/one:/two"
    monkeypatch.delenv("PYTHONPATH")
    assert search_path(tmp_path / "path") == f"{tmp_path}/path"


def test_what_runs_in_a_strange_interpreter_needs_nothing_but_the_standard_library() -> None:
    worker = "mball.server.worker"
    names = (f"{worker}.vllm_process", f"{worker}.vllm_server", f"{worker}.vllm_kv", "mball.memory.vllm_sleep")
    imports = "; ".join(f"import {name}" for name in names)
    subprocess.run([sys.executable, "-S", "-c", imports], env={"PYTHONPATH": str(ROOT / "src")}, check=True, timeout=60)
