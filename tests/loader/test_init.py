from __future__ import annotations

import subprocess
import sys

import pytest

import mball.loader


def test_all_that_it_names_is_there() -> None:
    for name in mball.loader.__all__:
        assert getattr(mball.loader, name).__name__ == name
    with pytest.raises(AttributeError, match=r"'mball.loader' has no attribute 'lod'"):
        mball.loader.lod  # noqa: B018


def test_headers_are_read_without_torch() -> None:
    code = "import sys; from mball.loader import Checkpoint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
