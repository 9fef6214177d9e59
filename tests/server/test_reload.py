"""A new configuration while it serves: taken whole or not at all, by a signal or by the file itself."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

from mball.server.config import Config
from mball.server.gateway.access import digest, new_key
from mball.server.reload import LIVE
from mball.server.run import bind, running_server

KEY = new_key()[0]
DEADLINE_S = 60.0


class Server:
    """One that reads its configuration from `file`, and what it has logged."""

    def __init__(self, url: str, pid: int, file: Path, log: Path) -> None:
        self.url = url
        self.pid = pid
        self.file = file
        self.log = log

    def write(self, **settings: Any) -> None:
        """As an editor does it: beside, and then in its place."""
        beside = self.file.with_suffix(".new")
        beside.write_text(yaml.safe_dump({"log_dir": "logs", "zygote": False, **settings}))
        beside.replace(self.file)

    def names(self) -> list[str]:
        answer = httpx.get(f"{self.url}/v1/models", headers={"x-api-key": KEY})
        return [model["id"] for model in answer.raise_for_status().json()["data"]]

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("reload")
    for name in "abc":
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    file, log = folder / "mball.yaml", folder / "log"
    Server("", 0, file, log).write(models=["a"])
    with running_server(["--config", str(file)], log=log) as running:
        yield Server(running.url, running.pid, file, log)


def test_the_file_is_taken_as_it_is_written_whatever_was_wrong_with_it_before(server: Server) -> None:
    assert server.names() == ["a"]
    for number, broken in enumerate(
        (
            {"models": ["a", "a"]},
            {"models": []},
            {"models": ["a"], "nothing": 1},
            {"models": [{"path": "b", "device": "cuda:99"}]},
        )
    ):
        server.write(**broken)
        server.until(
            lambda count=number: len(server.logged("configuration refused: the one before stays in force")) == count + 1
        )  # type: ignore[misc]
        assert server.names() == ["a"]
    server.file.write_text("models: [a\n")
    server.until(lambda: len(server.logged("configuration refused: the one before stays in force")) == 5)
    assert all(
        "\n" not in line["reason"] for line in server.logged("configuration refused: the one before stays in force")
    )
    server.write(models=["b", {"path": "c", "name": "d"}])
    server.until(lambda: server.names() == ["b", "d"])


def test_keys_and_limits_are_taken_and_what_cannot_be_is_named(server: Server) -> None:
    key = {"name": "k", "sha256": digest(KEY.encode()), "limits": {"requests_per_minute": 1}}
    server.write(models=["a"], api_keys=[key], max_body_bytes=10, port=9, dram_bytes="1GiB")
    server.until(lambda: httpx.get(f"{server.url}/v1/models").status_code == 401)
    assert server.names() == ["a"]
    ask = {"headers": {"x-api-key": KEY}, "content": b'{"model": "a"}'}
    assert httpx.post(f"{server.url}/v1/completions", **ask).status_code == 413
    server.until(lambda: bool(server.logged("some settings wait for a restart")))
    assert server.logged("some settings wait for a restart")[-1]["settings"] == ["dram_bytes", "port"]
    server.write(models=["a"])
    server.until(lambda: httpx.get(f"{server.url}/v1/models").status_code == 200)


def test_a_signal_reloads_where_the_file_is_not_watched(server: Server) -> None:
    server.write(models=["a"], reload_on_change=False)
    reloads = len(server.logged("configuration reloaded"))
    os.kill(server.pid, signal.SIGHUP)
    server.until(lambda: len(server.logged("configuration reloaded")) > reloads)
    server.write(models=["a", "b"], reload_on_change=False)
    assert server.names() == ["a"]
    os.kill(server.pid, signal.SIGHUP)
    server.until(lambda: server.names() == ["a", "b"])


def test_every_setting_is_live_or_waits_for_a_restart() -> None:
    assert set(Config.model_fields) >= LIVE


def test_a_terminal_that_closes_ends_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "mball.yaml").write_text("models: [a]\nzygote: false\n")
    ours, theirs = pty.openpty()
    with bind("127.0.0.1", 0) as sock:
        command = [sys.executable, "-m", "mball", "serve", "--fd", str(sock.fileno()), "--config", "mball.yaml"]
        process = subprocess.Popen(command, cwd=tmp_path, pass_fds=[sock.fileno()], stderr=theirs)
        os.close(theirs)
        try:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}/health"
            assert httpx.get(url, timeout=DEADLINE_S).status_code == 200
            os.close(ours)
            process.send_signal(signal.SIGHUP)
            assert process.wait(DEADLINE_S) == -signal.SIGTERM
        finally:
            process.kill()
            process.wait()
