"""`/v1/batches`: each line answered or told of once, whatever happens to the batch."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from mball.server.gateway import batches_run
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Gateway, Start
from tests.server.gateway.test_access import ADMIN, KEYS, USER, bearer
from tests.server.gateway.test_app import CHAT, body, error_of
from tests.server.gateway.test_files import put
from tests.small_disk import fill


def line(number: int, name: str, **fields: Any) -> dict[str, Any]:
    asked = {"model": name, "messages": [], **fields.pop("body", {})}
    return {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": asked, **fields}


def data_of(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in lines).encode()


async def create(running: Gateway, lines: list[dict[str, Any]], key: str = "", **fields: Any) -> dict[str, Any]:
    file = await put(running, data_of(lines), key)
    asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h", **fields}
    async with running.http.post(running.url + "/v1/batches", json=asked, headers=bearer(key)) as response:
        assert response.status == 200, await response.text()
        card: dict[str, Any] = await response.json()
        return card


async def get(running: Gateway, path: str, key: str = "") -> Any:
    async with running.http.get(f"{running.url}/v1/{path}", headers=bearer(key)) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def ended(batch: dict[str, Any]) -> bool:
    return batch["status"] in ("completed", "failed", "expired", "cancelled")


async def until(
    running: Gateway, batch: dict[str, Any], condition: Callable[[dict[str, Any]], bool] = ended, key: str = ""
) -> dict[str, Any]:
    async with asyncio.timeout(120):
        while not condition(batch := await get(running, f"batches/{batch['id']}", key)):  # noqa: ASYNC110 - as clients
            await asyncio.sleep(0.02)
    return batch


async def lines_of(running: Gateway, file_id: str | None, key: str = "") -> list[dict[str, Any]]:
    if file_id is None:
        return []
    async with running.http.get(f"{running.url}/v1/files/{file_id}/content", headers=bearer(key)) as response:
        assert response.status == 200
        return [json.loads(each) for each in (await response.read()).splitlines()]


async def each_once(running: Gateway, batch: dict[str, Any], count: int) -> tuple[int, int]:
    """How many answers and errors; together they are all lines, each once, and what the counts say."""
    answers = await lines_of(running, batch["output_file_id"])
    errors = await lines_of(running, batch["error_file_id"])
    assert Counter(each["custom_id"] for each in answers + errors) == Counter(f"r{n}" for n in range(count))
    assert batch["request_counts"] == {"total": count, "completed": len(answers), "failed": len(errors)}
    return len(answers), len(errors)


async def test_the_openai_client_has_a_batch_answered(gateway: Start, tmp_path: Path) -> None:
    running = await gateway(model("a"), model("b"), files={"path": tmp_path / "files"}, max_body_bytes=4096)
    lines = [line(n, "ab"[n % 2]) for n in range(40)]
    lines[7]["body"]["messages"] = [{"role": "user", "content": "x" * 5000}]
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        file = await client.files.create(file=("in.jsonl", data_of(lines)), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"night": "1"}
        )
        assert batch.status == "validating"
        assert batch.metadata == {"night": "1"}
        await until(running, batch.model_dump())
        batch = await client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (40, 39, 1)
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        answers = [json.loads(each) for each in (await client.files.content(batch.output_file_id)).text.splitlines()]
        (error,) = [json.loads(each) for each in (await client.files.content(batch.error_file_id)).text.splitlines()]
        assert (await client.files.retrieve(batch.output_file_id)).purpose == "batch_output"
        assert [each.id async for each in client.batches.list(limit=1)] == [batch.id]
    usages = [each["response"]["body"]["usage"] for each in answers]
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(each["prompt_tokens"] for each in usages) > 0
    assert batch.usage.output_tokens == sum(each["completion_tokens"] for each in usages) > 0
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens
    async with running.http.get(f"{running.url}/metrics") as response:
        figures = await response.text()
    assert 'mball:batches{status="completed"} 1.0' in figures
    assert 'mball:batches{status="in_progress"} 0.0' in figures
    assert {each["custom_id"] for each in answers} == {f"r{n}" for n in range(40) if n != 7}
    for each in answers:
        assert set(each) == {"id", "custom_id", "response", "error"}
        assert set(each["response"]) == {"status_code", "request_id", "body"}
        assert each["response"]["request_id"]
        said = each["response"]["body"]["choices"][0]["message"]["content"]
        assert said.startswith("ab"[int(each["custom_id"][1:]) % 2])
    assert (error["custom_id"], error["error"]["code"], error["response"]) == ("r7", "payload_too_large", None)
    assert [running.state(name)["promotions"] for name in "ab"] == [1, 1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/responses"])
async def test_other_endpoints_have_batches_too(gateway: Start, tmp_path: Path, path: str) -> None:
    running = await gateway(model("a"), files={"path": tmp_path / "files"})
    lines = [line(n, "a", url=path, body={"input": ["x"], "prompt": "x"}) for n in range(3)]
    batch = await until(running, await create(running, lines, endpoint=path))
    assert await each_once(running, batch, 3) == (3, 0)


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([], "empty_file", None),
        ([line(0, "a"), line(0, "a")], "invalid_line", 2),
        ([line(0, "a", url="/v1/completions")], "mismatched_url", 1),
        ([line(0, "none")], "model_not_found", 1),
        ([line(0, "a", body={"stream": True})], "invalid_line", 1),
        ([line(n, "a") for n in range(4)], "too_many_requests", 4),
    ],
    ids=["empty", "twice", "url", "model", "stream", "many"],
)
async def test_a_file_that_is_no_batch_fails_before_anything_is_asked(
    gateway: Start, tmp_path: Path, lines: list[dict[str, Any]], code: str, number: int | None
) -> None:
    running = await gateway(model("a"), files={"path": tmp_path / "files", "max_requests": 3})
    batch = await until(running, await create(running, lines))
    assert batch["status"] == "failed"
    assert batch["failed_at"] >= batch["created_at"]
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["line"]) == (code, number)
    assert running.state("a")["starts"] == 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"endpoint": "/v1/sleep"}, 400, "endpoint"),
        ({"completion_window": "1y"}, 400, "completion_window"),
        ({"completion_window": None}, 400, "completion_window"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after"),
        ({"input_file_id": "file-none"}, 404, "file_id"),
        ({"input_file_id": "../x"}, 404, "file_id"),
        ({"priority": 3}, 400, "priority"),
    ],
)
async def test_what_is_no_batch_is_refused_by_name(
    gateway: Start, tmp_path: Path, fields: dict[str, Any], status: int, param: str
) -> None:
    running = await gateway(model("a"), files={"path": tmp_path / "files"})
    file = await put(running)
    asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h", **fields}
    async with running.http.post(running.url + "/v1/batches", json=asked) as response:
        assert response.status == status
        assert (await error_of(response))["param"] == param
    assert (await get(running, "batches"))["data"] == []


async def test_a_cancelled_batch_keeps_its_answers(gateway: Start, tmp_path: Path) -> None:
    slow = model("a", Knobs(tokens=4, token_s=0.05))
    running = await gateway(slow, files={"path": tmp_path / "files", "concurrency": 2})
    batch = await create(running, [line(n, "a") for n in range(400)])
    async with running.http.delete(f"{running.url}/v1/files/{batch['input_file_id']}") as response:
        assert response.status == 400
        assert batch["id"] in (await error_of(response))["message"]
    await until(running, batch, lambda batch: batch["request_counts"]["completed"] >= 3)
    async with running.http.get(f"{running.url}/metrics") as response:
        assert 'mball:batch_requests{state="total"} 400.0' in await response.text()
    async with running.http.post(f"{running.url}/v1/batches/{batch['id']}/cancel") as response:
        assert (await response.json())["status"] == "cancelling"
    batch = await until(running, batch)
    assert batch["status"] == "cancelled"
    assert batch["cancelling_at"] <= batch["cancelled_at"]
    answers = await lines_of(running, batch["output_file_id"])
    assert 3 <= len(answers) == len({each["custom_id"] for each in answers}) < 400
    assert batch["request_counts"] == {"total": 400, "completed": len(answers), "failed": 0}
    await running.until(lambda: running.state("a")["in_flight"] == 0)
    async with running.http.post(f"{running.url}/v1/batches/{batch['id']}/cancel") as response:
        assert response.status == 400
    async with running.http.delete(f"{running.url}/v1/files/{batch['input_file_id']}") as response:
        assert response.status == 200


async def test_what_is_not_answered_in_its_window_is_told(gateway: Start, tmp_path: Path) -> None:
    slow = model("a", Knobs(tokens=4, token_s=0.05))
    running = await gateway(slow, files={"path": tmp_path / "files", "concurrency": 2})
    await running.manager.load("a")
    batch = await create(running, [line(n, "a") for n in range(100)], completion_window="3s")
    waiting = await create(running, [line(n, "a") for n in range(3)], completion_window="2s")
    batch, waiting = await until(running, batch), await until(running, waiting)
    assert (batch["status"], waiting["status"]) == ("expired", "expired")
    # How many were answered by then is the machine's affair.
    assert (await each_once(running, batch, 100))[1]
    assert {each["error"]["code"] for each in await lines_of(running, batch["error_file_id"])} == {"batch_expired"}
    assert await each_once(running, waiting, 3) == (0, 3)


async def test_a_batch_is_its_key_s_with_its_models_and_limits(gateway: Start, tmp_path: Path) -> None:
    keys = [KEYS[0] | {"models": ["a"], "limits": {"requests_per_minute": 3000, "max_in_flight": 1}}, KEYS[1]]
    settings = {"models": ["/models/a", "/models/b"], "api_keys": keys, "files": {"path": tmp_path / "files"}}
    running = await gateway(model("a"), model("b"), **settings)
    fine = await create(running, [line(n, "a") for n in range(10)], USER)
    other = await create(running, [line(0, "b")], USER)
    async with running.http.get(f"{running.url}/v1/batches/{fine['id']}", headers=bearer(ADMIN)) as response:
        assert response.status == 404
    cancel = f"{running.url}/v1/batches/{fine['id']}/cancel"
    async with running.http.post(cancel, headers=bearer(ADMIN)) as response:
        assert response.status == 404
    assert (await get(running, "batches", ADMIN))["data"] == []
    other = await until(running, other, key=USER)
    assert other["errors"]["data"][0]["code"] == "model_not_found"
    fine = await until(running, fine, key=USER)
    # What is over its limits waits, and is no error.
    assert (fine["status"], fine["request_counts"]["completed"]) == ("completed", 10)


async def test_the_oldest_batch_that_ended_gives_way(gateway: Start, tmp_path: Path) -> None:
    slow = model("a", Knobs(tokens=4, token_s=0.05))
    running = await gateway(slow, files={"path": tmp_path / "files", "max_batches": 2, "concurrency": 1})
    first = await until(running, await create(running, [line(0, "a")]))
    lasting = [await create(running, [line(n, "a") for n in range(200)]) for _ in range(2)]
    assert {each["id"] for each in (await get(running, "batches"))["data"]} == {each["id"] for each in lasting}
    assert await lines_of(running, first["output_file_id"])
    asked = {"input_file_id": first["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
    async with running.http.post(running.url + "/v1/batches", json=asked) as response:
        assert response.status == 400
        assert (await error_of(response))["code"] == "storage_limit_exceeded"


async def test_a_batch_waits_for_a_full_disk_and_loses_nothing(
    gateway: Start, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_run, "_AGAIN_S", 0.1)
    running = await gateway(model("a", Knobs(tokens=3000)), files={"path": small_disk / "files"})
    batch = await create(running, [line(n, "a") for n in range(60)])
    await until(running, batch, lambda batch: batch["status"] == "in_progress")
    fill(small_disk)

    def stopped(batch: dict[str, Any]) -> bool:
        state = running.state("a")
        return bool(state["promotions"]) and not state["in_flight"] and not state["queued"]

    assert (await until(running, batch, stopped))["status"] == "in_progress"
    (small_disk / "others").unlink()
    batch = await until(running, batch)
    assert batch["status"] == "completed"
    assert await each_once(running, batch, 60) == (60, 0)


async def test_a_batch_waits_until_its_key_has_room(
    gateway: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_run, "_AGAIN_S", 0.1)
    files = {"path": tmp_path / "files", "max_bytes": 250_000, "concurrency": 1}
    running = await gateway(model("a", Knobs(tokens=3000)), files=files)
    other = await put(running, bytes(150_000))
    batch = await create(running, [line(n, "a") for n in range(10)])
    await until(running, batch, lambda batch: batch["request_counts"]["completed"] >= 6)
    await running.until(lambda: running.state("a")["in_flight"] == 0)
    assert (await get(running, f"batches/{batch['id']}"))["status"] == "in_progress"
    async with running.http.delete(f"{running.url}/v1/files/{other['id']}") as response:
        assert response.status == 200
    batch = await until(running, batch)
    assert await each_once(running, batch, 10) == (10, 0)


async def test_a_batch_whose_input_is_gone_fails_and_says_so(gateway: Start, tmp_path: Path) -> None:
    slow = model("a", Knobs(tokens=4, token_s=0.05))
    running = await gateway(slow, files={"path": tmp_path / "files", "concurrency": 1})
    first = await create(running, [line(n, "a") for n in range(4)])
    batch = await create(running, [line(n, "a") for n in range(4)])
    await until(running, batch, lambda batch: batch["status"] == "in_progress")
    (data,) = (tmp_path / "files").rglob(f"{batch['input_file_id']}.jsonl")
    data.unlink()
    batch, first = await until(running, batch), await until(running, first)
    assert (first["status"], batch["status"]) == ("completed", "failed")
    assert "No such file" in batch["errors"]["data"][0]["message"]


async def test_a_batch_s_worker_that_dies_costs_no_line(gateway: Start, tmp_path: Path) -> None:
    counter = str(tmp_path / "counter")
    dying = model("a", Knobs(crash_at="request", times=2, counter=counter))
    running = await gateway(dying, files={"path": tmp_path / "files", "concurrency": 2})
    batch = await until(running, await create(running, [line(n, "a") for n in range(20)]))
    assert await each_once(running, batch, 20) == (20, 0)
    assert running.state("a")["crashes"] == 2


async def test_who_waits_for_an_answer_goes_before_a_batch(gateway: Start, tmp_path: Path) -> None:
    slow = model("a", Knobs(tokens=1, token_s=0.1), max_in_flight=1)
    running = await gateway(slow, files={"path": tmp_path / "files", "concurrency": 20})
    batch = await create(running, [line(n, "a") for n in range(100)])
    await running.until(lambda: running.state("a")["queued"] == 19)
    for _ in range(3):
        before = (await get(running, f"batches/{batch['id']}"))["request_counts"]["completed"]
        async with running.http.post(running.url + CHAT, data=body("a")) as response:
            assert response.status == 200
        after = await get(running, f"batches/{batch['id']}")
        assert after["status"] == "in_progress"
        # The one that was inside, and one that came in on the way: not the nineteen that were there before.
        assert after["request_counts"]["completed"] - before <= 4
