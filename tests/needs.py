"""What some tests need and not every machine has."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(need: str, why: str) -> NoReturn:
    """Skips the test, or fails it where MBALL_REQUIRE names that need."""
    if need in os.environ.get("MBALL_REQUIRE", "").split(","):
        pytest.fail(why)
    pytest.skip(why)
