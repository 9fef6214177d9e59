"""A server whose disk is full, read-only or too small answers all the same."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.conftest import Serve
from tests.e2e.kv_server import A, ask, models, settings, state, store
from tests.small_disk import fill, freeze


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
    freeze(small_disk)
    with serve(models(models_dir, A), **options) as server:
        swap = store(server)
        assert swap["state"] == "open"
        assert swap["read_only"]
        again, restored = ask(server)
        assert restored > 0
        assert again in (text, warm)
