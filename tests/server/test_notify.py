"""What systemd is told, by a socket of ours in its place."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mball.server.notify import Notifier
from mball.server.run import running_server


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        path = tmp_path / "notify"
        sock.bind(str(path))
        sock.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield sock


def test_a_server_says_that_it_is_ready_lives_and_stops(
    systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with running_server([str(model), "--log-dir", str(tmp_path / "logs")], log=tmp_path / "log"):
        assert systemd.recv(100) == b"READY=1"
        assert [systemd.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    systemd.setblocking(False)
    told = []
    try:
        while True:
            told.append(systemd.recv(100))
    except BlockingIOError:
        pass
    assert told.count(b"STOPPING=1") == 1
    assert set(told) <= {b"STOPPING=1", b"WATCHDOG=1"}


def test_workers_do_not_inherit_it(systemd: socket.socket) -> None:
    Notifier().ready()
    assert systemd.recv(100) == b"READY=1"
    assert "NOTIFY_SOCKET" not in os.environ


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0mball-test-{os.getpid()}")
        sock.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@mball-test-{os.getpid()}")
        Notifier().stopping()
        assert sock.recv(100) == b"STOPPING=1"


async def test_who_does_not_listen_is_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    Notifier().ready()
    assert "systemd was not told" in capsys.readouterr().out
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    async with asyncio.timeout(30):
        await Notifier().stay_alive()


def test_a_reload_begins_and_ends(systemd: socket.socket) -> None:
    notifier = Notifier()
    notifier.reloading(True)
    notifier.reloading(False)
    assert systemd.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert systemd.recv(100) == b"READY=1"
