"""The demo models, for tests that want a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / ".demo" / "models"


def demo_model(name: str) -> Path:
    """Its folder. Where it was not made the test is skipped, or fails where MBALL_REQUIRE names `demo-models`."""
    path = FOLDER / name
    if not path.is_dir():
        if "demo-models" in os.environ.get("MBALL_REQUIRE", "").split(","):
            pytest.fail(f"no demo model at {path}; run `make models`")
        pytest.skip("no demo models: run `make models`")
    return path
