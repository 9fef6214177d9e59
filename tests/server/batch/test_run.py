from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mball.errors import ConfigError
from mball.server.batch import lines
from mball.server.batch.answers import Answers
from mball.server.batch.run import Tally, run_batch
from mball.server.client import ServerUnreachable

Answer = Callable[[dict[str, Any]], web.Response | None]
Serve = Callable[..., AbstractAsyncContextManager["Server"]]


class Server:
    """Answers each request with its own text, and remembers what it was asked, in order."""

    def __init__(self, answer: Answer, delay_s: float) -> None:
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.url = ""
        self._answer = answer
        self._delay_s = delay_s

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self._delay_s)
            if (response := self._answer(body)) is not None:
                return response
            usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
            answer = {"object": "chat.completion", "echo": body["messages"], "usage": usage}
            return web.json_response(answer, headers={"x-request-id": f"req-{len(self.asked)}"})
        finally:
            self.at_once -= 1


@pytest.fixture
def serve() -> Serve:
    @contextlib.asynccontextmanager
    async def run(answer: Answer = lambda _: None, delay_s: float = 0.0) -> AsyncIterator[Server]:
        server = Server(answer, delay_s)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield server
        finally:
            await runner.cleanup()

    return run


def request(custom_id: str, model: str = "m", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"text of {custom_id}"}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, "messages": messages, **body},
    }


def put(path: Path, requests: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in requests))


def get(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def errors(tmp_path: Path) -> Path:
    return tmp_path / "errors.jsonl"


async def test_every_request_has_its_own_answer(serve: Serve, source: Path, target: Path, errors: Path) -> None:
    put(source, [request(f"r{number}") for number in range(40)])
    async with serve() as server:
        tally = await run_batch(source, target, server.url, errors=errors)
    answers = {line["custom_id"]: line for line in get(target)}
    assert len(get(target)) == len(answers) == 40
    for custom_id, line in answers.items():
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["request_id"].startswith("req-")
        assert line["response"]["body"]["echo"][0]["content"] == f"text of {custom_id}"
    assert len({line["id"] for line in answers.values()}) == 40
    assert (tally.done, tally.failed, tally.bad, tally.skipped, tally.tokens) == (40, 0, 0, 0, 200)
    assert not errors.exists()


async def test_models_come_one_after_the_other(serve: Serve, source: Path, target: Path, errors: Path) -> None:
    put(source, [request(f"r{number}", model=f"m{number % 3}") for number in range(30)])
    async with serve() as server:
        await run_batch(source, target, server.url, errors=errors, concurrency=1)
    assert [body["model"] for body in server.asked] == ["m0"] * 10 + ["m1"] * 10 + ["m2"] * 10


async def test_no_more_at_once_than_allowed(serve: Serve, source: Path, target: Path, errors: Path) -> None:
    put(source, [request(f"r{number}") for number in range(20)])
    async with serve(delay_s=0.02) as server:
        await run_batch(source, target, server.url, errors=errors, concurrency=3)
    assert server.most_at_once == 3


async def test_bad_lines_are_told_and_the_others_answered(
    serve: Serve, source: Path, target: Path, errors: Path
) -> None:
    bad = [
        "{",
        "[]",
        json.dumps(request("") | {"custom_id": ""}),
        json.dumps(request("get") | {"method": "GET"}),
        json.dumps(request("url") | {"url": "/v1/nothing"}),
        json.dumps(request("body") | {"body": {"messages": []}}),
        json.dumps(request("stream", stream=True)),
        json.dumps(request("good")),
    ]
    source.write_text("\n".join([json.dumps(request("good")), "", *bad]))
    async with serve() as server:
        tally = await run_batch(source, target, server.url, errors=errors)
    assert [line["custom_id"] for line in get(target)] == ["good"]
    assert tally.bad == len(bad)
    told = [line["error"]["message"] for line in get(errors)]
    assert [message.partition(":")[0] for message in told] == [f"line {number}" for number in range(3, 11)]
    assert "same custom_id" in told[-1]
    assert {line["error"]["code"] for line in get(errors)} == {"invalid_line"}


async def test_what_is_answered_is_not_asked_again(serve: Serve, source: Path, target: Path, errors: Path) -> None:
    put(source, [request(f"r{number}") for number in range(10)])
    done = [lines.answer(f"r{number}", status=200, body={}) for number in range(4)]
    put(target, done)
    with target.open("a") as file:
        file.write('{"id": "batch_req_half", "custom_id": "r5", "resp')
    async with serve() as server:
        tally = await run_batch(source, target, server.url, errors=errors)
        assert len(server.asked) == 6
        again = await run_batch(source, target, server.url, errors=errors)
        assert len(server.asked) == 6
    assert (tally.skipped, tally.done, again.skipped, again.done) == (4, 6, 10, 0)
    assert sorted(line["custom_id"] for line in get(target)) == [f"r{number}" for number in range(10)]


async def test_a_killed_batch_goes_on_where_it_was(serve: Serve, source: Path, target: Path, errors: Path) -> None:
    put(source, [request(f"r{number}") for number in range(30)])
    held = asyncio.Event()

    def stall(body: dict[str, Any]) -> None:
        if len(server.asked) > 12:
            held.set()

    async with serve(stall, delay_s=0.05) as server:
        arguments = ["batch", "-i", source, "-o", target, "--url", server.url, "--concurrency", "2"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mball", *map(str, arguments), stderr=subprocess.DEVNULL
        )
        await asyncio.wait_for(held.wait(), 60)
        process.send_signal(signal.SIGKILL)
        await asyncio.wait_for(process.wait(), 60)
        finished = target.read_bytes().count(b"\n")
        before = len(server.asked)
        assert 0 < finished < 30
        tally = await run_batch(source, target, server.url, errors=errors)
    assert tally.skipped == finished
    assert len(server.asked) - before == 30 - finished
    assert sorted(line["custom_id"] for line in get(target)) == sorted(f"r{number}" for number in range(30))


async def test_a_busy_server_is_asked_again(serve: Serve, source: Path, target: Path, errors: Path) -> None:
    put(source, [request("r")])

    def busy_twice(_: dict[str, Any]) -> web.Response | None:
        return web.Response(status=503, headers={"Retry-After": "0.01"}) if len(server.asked) < 3 else None

    async with serve(busy_twice) as server:
        tally = await run_batch(source, target, server.url, errors=errors)
    assert len(server.asked) == 3
    assert tally.failed == 0


@pytest.mark.parametrize(("status", "asked"), [(400, 1), (404, 1), (503, 2)])
async def test_a_refused_request_goes_to_the_errors(
    serve: Serve, source: Path, target: Path, errors: Path, status: int, asked: int
) -> None:
    put(source, [request("bad", model="none"), request("good")])

    def refuse(body: dict[str, Any]) -> web.Response | None:
        error = {"error": {"message": "no such model", "code": "model_not_found"}}
        return web.json_response(error, status=status) if body["model"] == "none" else None

    async with serve(refuse) as server:
        tally = await run_batch(source, target, server.url, errors=errors, attempts=2)
    assert len(server.asked) == asked + 1
    assert [line["custom_id"] for line in get(target)] == ["good"]
    (line,) = get(errors)
    assert line["custom_id"] == "bad"
    assert line["response"]["status_code"] == status
    assert line["error"] == {"message": "no such model", "code": "model_not_found"}
    assert tally.failed == 1


async def test_an_answer_that_is_no_json_is_an_error(serve: Serve, source: Path, target: Path, errors: Path) -> None:
    put(source, [request("r")])
    async with serve(lambda _: web.Response(text="<html>")) as server:
        await run_batch(source, target, server.url, errors=errors)
    (line,) = get(errors)
    assert line["error"]["code"] == "http_200"


async def test_a_request_that_takes_too_long_is_an_error(
    serve: Serve, source: Path, target: Path, errors: Path
) -> None:
    put(source, [request("r")])
    async with serve(delay_s=2) as server:
        await run_batch(source, target, server.url, errors=errors, timeout_s=0.2)
    (line,) = get(errors)
    assert line["error"]["code"] == "timeout"


async def test_without_a_server_the_batch_ends_with_the_way_out(source: Path, target: Path, errors: Path) -> None:
    put(source, [request(f"r{number}") for number in range(5)])
    with pytest.raises(ServerUnreachable, match="mball serve"):
        await run_batch(source, target, "http://127.0.0.1:9", errors=errors, attempts=2)
    assert target.read_text() == ""


async def test_two_batches_do_not_share_an_output(source: Path, target: Path, errors: Path) -> None:
    put(source, [request("r")])
    with Answers(target), pytest.raises(ConfigError, match="another batch is writing it"):
        await run_batch(source, target, "http://127.0.0.1:9", errors=errors)


async def test_an_output_that_is_something_else_is_left_alone(source: Path, target: Path, errors: Path) -> None:
    put(source, [request("r")])
    target.write_text("my notes\nmore")
    with pytest.raises(ConfigError, match="line 1 is no answer of a batch"):
        await run_batch(source, target, "http://127.0.0.1:9", errors=errors)
    assert target.read_text() == "my notes\nmore"


async def test_an_input_that_is_not_there(tmp_path: Path, target: Path, errors: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        await run_batch(tmp_path / "nothing", target, "http://127.0.0.1:9", errors=errors)


async def test_progress_is_told(serve: Serve, source: Path, target: Path, errors: Path) -> None:
    put(source, [request(f"r{number}") for number in range(5)])
    told: list[tuple[int, int]] = []

    def progress(tally: Tally) -> None:
        told.append((tally.done, tally.total))

    async with serve() as server:
        await run_batch(source, target, server.url, errors=errors, progress=progress)
    assert told == [(done, 5) for done in range(6)]


async def test_the_command_says_what_it_did(serve: Serve, source: Path, target: Path) -> None:
    put(source, [request("a"), request("b")])
    with source.open("a") as file:
        file.write("broken\n")
    async with serve() as server:
        command = [sys.executable, "-m", "mball", "batch", "-i", str(source), "-o", str(target), "--json"]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "MBALL_URL": server.url}
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    summary = json.loads(output)
    assert (summary["done"], summary["failed"], summary["bad"], summary["tokens"]) == (2, 0, 1, 10)
    assert len(get(target.with_name("out.jsonl.errors"))) == 1


async def test_a_terminal_shows_how_far_it_is_and_how_fast(serve: Serve, source: Path, target: Path) -> None:
    put(source, [request(f"r{number}") for number in range(40)])
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    shown, loop = bytearray(), asyncio.get_running_loop()
    loop.add_reader(ours, lambda: shown.extend(os.read(ours, 1 << 16)))
    try:
        async with serve() as server:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "mball", "batch", "-i", source, "-o", target, "--url", server.url),
                stdout=subprocess.DEVNULL,
                stderr=theirs,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
            )
            async with asyncio.timeout(60):
                assert await process.wait() == 0
        with contextlib.suppress(BlockingIOError):
            shown.extend(os.read(ours, 1 << 16))
    finally:
        loop.remove_reader(ours)
        os.close(ours)
        os.close(theirs)
    assert b"40/40" in shown
    assert b"tokens/s" in shown
