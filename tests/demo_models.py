"""The demo models, for tests that want a real one."""

from __future__ import annotations

from pathlib import Path

from tests.needs import missing

FOLDER = Path(__file__).parents[1] / ".demo" / "models"


def demo_model(name: str) -> Path:
    """Its folder. Where it was not made the test is skipped, or fails where MBALL_REQUIRE names `demo-models`."""
    path = FOLDER / name
    if not path.is_dir():
        missing("demo-models", f"no demo model at {path}: run `make models`")
    return path
