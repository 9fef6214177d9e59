from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mball.server.models import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "weights").write_bytes(bytes(100))
    (tmp_path / "sub" / "config.json").write_text("{}")
    manifest.write(tmp_path, "1")
    return tmp_path


def test_a_made_folder_is_whole(folder: Path) -> None:
    assert manifest.is_whole(folder, "1")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").write_bytes(bytes(99) + b"x"),
        lambda folder: (folder / "weights").write_bytes(bytes(99)),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "sub" / "other").write_text(""),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"recipe": "1"'),
        lambda folder: (folder / "manifest.json").write_text("[]"),
    ],
    ids=[
        "a changed byte",
        "a short file",
        "a lost file",
        "a file too many",
        "no manifest",
        "half a manifest",
        "a list",
    ],
)
def test_a_damaged_folder_is_not_whole(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder)
    assert not manifest.is_whole(folder, "1")


def test_a_folder_of_an_older_recipe_is_not_whole(folder: Path) -> None:
    assert not manifest.is_whole(folder, "2")


def test_the_digests_of_shards_beside_it_change_nothing(folder: Path) -> None:
    (folder / "mball-manifest.json").write_text("{}")
    assert manifest.is_whole(folder, "1")
