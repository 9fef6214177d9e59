"""Real servers with real models."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from mball.server.run import Running, running_server

ROOT = Path(__file__).parents[2]
CHAT_MODELS = ("smollm2-135m", "smollm2-135m-27l", "smollm2-135m-fp32")
EMBEDDING_MODEL = "all-minilm-l6-v2"

Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The demo models, made once (idempotent)."""
    folder = ROOT / ".demo" / "models"
    subprocess.run([sys.executable, "-m", "mball", "models", "prepare-demo", str(folder)], check=True, timeout=900)
    return folder


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """`serve(models=[…], **settings)` runs `mball serve` with that configuration and yields it."""

    @contextlib.contextmanager
    def run(models: list[Any], **settings: Any) -> Iterator[Running]:
        config = tmp_path / "mball.yaml"
        config.write_text(yaml.safe_dump({"models": models, "log_dir": str(tmp_path / "logs"), **settings}))
        log = tmp_path / "server.log"
        try:
            with running_server(["--config", str(config)], log=log) as server:
                yield server
        except BaseException:
            sys.stderr.write(log.read_text()[-8000:])
            raise

    return run
