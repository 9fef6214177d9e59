"""What every test has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.small_disk import mounted

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Before torch is imported. Its threads spin for each other, which on two busy cores makes a second's work minutes."""

settings.register_profile("mball", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mball")


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers under test learn from no run before, and leave nothing in the home of whoever tests."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small") as path:
        yield path
