"""A server whose disk is full, read-only or too small answers all the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.kv_server import A, ask, models, settings, state, store

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(where)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"can't mount: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def fill(where: Path) -> None:
    with contextlib.suppress(OSError), (where / "others").open("wb", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass


def test_a_store_that_has_no_room(serve: Serve, models_dir: Path, small_disk: Path) -> None:
    """Nor do the logs, and what is kept of each model."""
    fill(small_disk)
    with serve(models(models_dir, A), **settings(small_disk), log_dir=str(small_disk / "logs")) as server:
        text, cached = ask(server)
        assert cached == 0
        swap = store(server)
        assert swap["state"] == "unavailable"
        assert "No space left" in swap["error"]
        assert ask(server)[0] == text
        assert state(server)["engine"]["error"] is None


def test_a_disk_that_fills_up_meanwhile(serve: Serve, models_dir: Path, small_disk: Path) -> None:
    options = settings(small_disk, log_dir=str(small_disk / "logs"))
    options["swap"]["size_bytes"] = "40MiB"
    with serve(models(models_dir, A), **options) as server:
        text, _ = ask(server)
        fill(small_disk)
        assert store(server)["state"] == "open"
        warm, cached = ask(server)
    with serve(models(models_dir, A), **options) as server:
        assert 0 < store(server)["blocks"] <= 20, "as many as it holds, and never more"
        again, restored = ask(server)
        assert 0 < restored <= cached
        assert again in (text, warm)
        assert state(server)["engine"]["kv_failures"] == 0


def test_a_file_system_that_is_read_only(serve: Serve, models_dir: Path, small_disk: Path) -> None:
    options = settings(small_disk, log_dir=str(small_disk / "logs"))
    options["swap"]["size_bytes"] = "40MiB"
    with serve(models(models_dir, A), **options) as server:
        text, _ = ask(server)
        warm, _ = ask(server)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with serve(models(models_dir, A), **options) as server:
        swap = store(server)
        assert swap["state"] == "open"
        assert swap["read_only"]
        again, restored = ask(server)
        assert restored > 0
        assert again in (text, warm)
