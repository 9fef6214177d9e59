"""The command line against a running server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mball import __version__
from mball.server.run import Running, running_server
from mball.units import MiB
from tests.e2e.conftest import CHAT_MODELS

MODEL = CHAT_MODELS[0]


def mball(*arguments: str, code: int = 0) -> str:
    ended = subprocess.run([sys.executable, "-m", "mball", *arguments], capture_output=True, text=True, timeout=300)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout if code == 0 else ended.stderr


@pytest.fixture(scope="module")
def server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running_server([str(models_dir / MODEL)], log=log) as running:
        yield running


def test_a_model_is_moved_by_hand(server: Running) -> None:
    def moved(verb: str) -> dict[str, object]:
        state: dict[str, object] = json.loads(mball(verb, MODEL, "--url", server.url, "--json"))
        return state

    assert moved("load")["shown_as"] == "device"
    assert moved("pin")["pinned"] is True
    assert moved("unpin")["pinned"] is False
    assert moved("unload")["shown_as"] in ("dram", "stopped")
    assert MODEL in mball("ps", "--url", server.url)
    state = json.loads(mball("ps", "--url", server.url, "--json"))
    assert state["models"][0]["promotions"] == 1


def test_a_model_does_without_memory_while_it_serves(server: Running) -> None:
    mball("load", MODEL, "--url", server.url)
    assert "device, 64." in mball("balloon", MODEL, "64MiB", "--url", server.url)
    state = json.loads(mball("ps", "--url", server.url, "--json"))["models"][0]
    assert 64 * MiB <= state["ballooned_bytes"] < 65 * MiB
    shown = mball("ps", "--url", server.url)
    assert "*64." in shown
    assert "(measured)" in shown
    assert "asked for by hand" in shown
    assert json.loads(mball("chat", MODEL, "-m", "Hi", "--max-tokens", "4", "--url", server.url, "--json"))["content"]
    told = mball("events", "--no-follow", "--url", server.url)
    assert "ballooned: asked for by hand" in told
    assert f"{MODEL} promoted" in told
    assert mball("balloon", MODEL, "0", "--url", server.url).endswith("0 B ballooned\n")
    assert "1.0 TiB" in mball("balloon", MODEL, "1TiB", "--url", server.url, code=1)
    assert "not a size" in mball("balloon", MODEL, "much", "--url", server.url, code=2)


def test_events_are_followed_as_they_happen(server: Running) -> None:
    mball("load", MODEL, "--url", server.url)
    command = [sys.executable, "-m", "mball", "events", "-n", "1", "--json", "--url", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        try:
            json.loads(following.stdout.readline())
            mball("unload", MODEL, "--url", server.url)
            event = json.loads(following.stdout.readline())
            assert (event["kind"], event["reason"]) == ("demoted", "unloaded on request")
        finally:
            following.terminate()


def test_chat_once(server: Running) -> None:
    answer = mball("chat", MODEL, "-m", "Say hello.", "--max-tokens", "8", "--url", server.url, "--json")
    assert json.loads(answer)["content"]


def test_batch(server: Running, tmp_path: Path) -> None:
    lines = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
        }
        for number in range(5)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mball("batch", "-i", str(source), "-o", str(target), "--url", server.url)
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == {line["custom_id"] for line in lines}
    assert all(answer["response"]["status_code"] == 200 for answer in answers)


def test_an_unknown_model_is_one_line(server: Running) -> None:
    assert "not served here" in mball("load", "nobody", "--url", server.url, code=1)


def test_no_server_is_one_line() -> None:
    assert "mball serve" in mball("ps", "--url", "http://127.0.0.1:9", code=1)


def test_version_and_help() -> None:
    assert mball("--version").strip() == f"mball {__version__}"
    assert "completion" in mball("--help")
