"""`/v1/files`: what comes in is kept, bounded, and its owner's alone."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.errors import InvalidRequest, NotFound
from mball.server.config import FilesConfig
from mball.server.gateway.access import new_key
from mball.server.gateway.files_store import File, Files, lock, owner_of
from mball.server.gateway.files_upload import _Parser
from mball.units import KiB, MiB
from tests.memory.conftest import model
from tests.server.gateway.conftest import Gateway, Start
from tests.server.gateway.test_access import KEYS, USER, bearer, entry
from tests.server.gateway.test_app import error_of
from tests.small_disk import fill

DATA = b'{"custom_id": "1"}\n' * 100


def form(data: bytes = DATA, **fields: str) -> aiohttp.FormData:
    """The file first: its bytes come before anything says what they are for."""
    form = aiohttp.FormData()
    form.add_field("file", data, filename="in.jsonl", content_type="application/jsonl")
    for name, value in {"purpose": "batch", **fields}.items():
        form.add_field(name, value)
    return form


async def put(running: Gateway, data: bytes = DATA, key: str = "", **fields: str) -> dict[str, Any]:
    headers = bearer(key)
    async with running.http.post(running.url + "/v1/files", data=form(data, **fields), headers=headers) as response:
        assert response.status == 200, await response.text()
        card: dict[str, Any] = await response.json()
        return card


def on_disk(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


async def test_a_file_is_kept_listed_read_and_deleted(gateway: Start, tmp_path: Path) -> None:
    running = await gateway(model("a"), files={"path": tmp_path / "files"})
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        first = await client.files.create(file=("in.jsonl", DATA), purpose="batch")
        second = await client.files.create(
            file=("b.jsonl", b""), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert (first.object, first.bytes, first.filename, first.purpose) == ("file", len(DATA), "in.jsonl", "batch")
        assert second.expires_at == second.created_at + 3600
        assert {file.id for file in (await client.files.list()).data} == {first.id, second.id}
        newest = [file.id async for file in client.files.list(limit=1)]
        oldest = [file.id async for file in client.files.list(limit=1, order="asc")]
        assert newest == oldest[::-1]
        assert set(newest) == {first.id, second.id}
        assert await client.files.retrieve(first.id) == first
        assert (await client.files.content(first.id)).content == DATA
        assert (await client.files.delete(first.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.files.content(first.id)
    assert {path.stem for path in on_disk(tmp_path / "files")} == {second.id}


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (form(purpose="fine-tune"), 400, "must be batch, not 'fine-tune'"),
        (form(surprise="yes"), 400, "unknown field 'surprise'"),
        (form(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "-1"}), 400, "3600 to"),
        (form(**{"x" * 10: "y" * 5000}), 400, "over 4096 bytes"),
        (form(b"x" * (64 * KiB + 1)), 413, "max_file_bytes"),
        (b"{}", 400, "multipart/form-data"),
    ],
    ids=["purpose", "unknown", "expiry", "long", "large", "json"],
)
async def test_what_is_no_file_for_a_batch_is_refused_and_nothing_of_it_stays(
    gateway: Start, tmp_path: Path, data: Any, status: int, says: str
) -> None:
    running = await gateway(model("a"), files={"path": tmp_path / "files", "max_file_bytes": 64 * KiB})
    async with running.http.post(running.url + "/v1/files", data=data) as response:
        assert response.status == status
        assert says in (await error_of(response))["message"]
    assert on_disk(tmp_path / "files") == []


async def test_an_endless_file_is_refused_while_it_arrives(gateway: Start, tmp_path: Path) -> None:
    running = await gateway(model("a"), files={"path": tmp_path / "files", "max_file_bytes": MiB})
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        while sent < 1024 * MiB:
            sent += 64 * KiB
            yield b" " * 64 * KiB

    headers = {"content-type": "multipart/form-data; boundary=b"}
    try:
        async with running.http.post(running.url + "/v1/files", data=endless(), headers=headers) as response:
            assert response.status == 413
    except aiohttp.ClientConnectionError:
        pass  # closed in the sender's face
    assert sent < 64 * MiB
    assert on_disk(tmp_path / "files") == []


async def test_files_are_bounded_in_number_and_bytes_also_while_they_come(gateway: Start, tmp_path: Path) -> None:
    limits = {"path": tmp_path / "files", "max_files": 3, "max_bytes": 100 * KiB}
    running = await gateway(model("a"), files=limits)

    async def try_to_put(size: int) -> int:
        async with running.http.post(running.url + "/v1/files", data=form(b"x" * size)) as response:
            if response.status != 200:
                assert (await error_of(response))["code"] == "storage_limit_exceeded"
            return response.status

    assert sorted(await asyncio.gather(*(try_to_put(60 * KiB) for _ in range(2)))) != [200, 200]
    while await try_to_put(1) == 200:
        pass
    assert 0 < len(on_disk(tmp_path / "files")) <= 6
    async with running.http.get(running.url + "/v1/files") as response:
        files = (await response.json())["data"]
        assert len(files) == 3
    async with running.http.delete(f"{running.url}/v1/files/{files[0]['id']}"):
        assert await try_to_put(1) == 200


async def test_a_key_s_files_are_not_there_for_another(gateway: Start, tmp_path: Path) -> None:
    other = new_key()[0]
    keys = [*KEYS, entry(other, "other")]
    running = await gateway(model("a"), api_keys=keys, files={"path": tmp_path / "files"})
    card = await put(running, key=USER)
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        url = f"{running.url}/v1/files/{card['id']}{path}"
        async with running.http.request(method, url, headers=bearer(other)) as response:
            assert response.status == 404
            assert (await error_of(response))["code"] == "not_found"
        async with running.http.request(method, url) as response:
            assert response.status == 401
    async with running.http.get(running.url + "/v1/files", headers=bearer(other)) as response:
        assert (await response.json())["data"] == []
    asked = {"input_file_id": card["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    async with running.http.post(running.url + "/v1/batches", json=asked, headers=bearer(other)) as response:
        assert response.status == 404
    async with running.http.get(f"{running.url}/v1/files/{card['id']}/content", headers=bearer(USER)) as response:
        assert await response.read() == DATA


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "order=up", "after=file-none"])
async def test_a_list_is_asked_for_properly(gateway: Start, tmp_path: Path, query: str) -> None:
    running = await gateway(model("a"), files={"path": tmp_path / "files"})
    async with running.http.get(f"{running.url}/v1/files?{query}") as response:
        assert response.status == (404 if "after" in query else 400)
        assert (await error_of(response))["param"] == query.partition("=")[0]


async def test_one_folder_is_one_server_s(gateway: Start, tmp_path: Path) -> None:
    other = lock(tmp_path / "files")
    try:
        running = await gateway(model("a"), files={"path": tmp_path / "files"})
        for path in ("files", "batches"):
            async with running.http.get(f"{running.url}/v1/{path}") as response:
                assert response.status == 503
                assert "another server's" in (await error_of(response))["message"]
        async with running.http.get(running.url + "/v1/models") as response:
            assert response.status == 200
    finally:
        os.close(other)


async def test_a_full_disk_refuses_a_file_and_keeps_those_before(gateway: Start, small_disk: Path) -> None:
    running = await gateway(model("a"), files={"path": small_disk / "files"})
    kept = await put(running)
    fill(small_disk)
    async with running.http.post(running.url + "/v1/files", data=form(b"x" * MiB)) as response:
        assert response.status == 503
        error = await error_of(response)
        assert "No space left" in error["message"]
        assert error["code"] == "storage_failed"
    async with running.http.get(f"{running.url}/v1/files/{kept['id']}/content") as response:
        assert await response.read() == DATA
    assert {path.stem for path in on_disk(small_disk / "files")} == {kept["id"]}


async def test_what_a_crash_left_half_is_removed_and_the_rest_is_there(tmp_path: Path) -> None:
    limits, owner = FilesConfig(), owner_of("user")
    files = Files(tmp_path, limits)
    folder = await files.open_folder(owner)
    for number in range(3):
        files.path(owner, f"file-{number}").write_bytes(DATA)
        await files.add(owner, File(f"file-{number}", "in", "batch", 1, len(DATA)))
    (folder / "file-half.part").write_bytes(b"x")
    files.path(owner, "file-nameless").write_bytes(b"x")
    files.path(owner, "file-growing").write_bytes(b"x")
    (folder / "file-1.json").write_text('{"id": ')
    (folder / "file-2.json").write_text('{"id": 3}')
    again = Files(tmp_path, limits)
    again.load({"file-growing"})
    assert [file.id for file in again.all(owner)] == ["file-0"]
    assert not (folder / "file-half.part").exists()
    assert not files.path(owner, "file-nameless").exists()
    assert files.path(owner, "file-growing").exists()


async def test_an_expired_file_is_not_there(tmp_path: Path) -> None:
    root, owner = tmp_path / "files", owner_of("")
    root.mkdir()
    files = Files(root, FilesConfig())
    await files.open_folder(owner)
    files.path(owner, "file-a").write_bytes(DATA)
    await files.add(owner, File("file-a", "in", "batch", 1, len(DATA), expires_at=2))
    with pytest.raises(NotFound):
        files.get(owner, "file-a")
    assert files.all(owner) == []
    await files.sweep(lambda owner, file_id: file_id == "file-a")
    assert len(on_disk(root)) == 2
    await files.sweep(lambda owner, file_id: False)
    assert on_disk(root) == []


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 500), max_size=8), purpose=st.text(max_size=20))
def test_a_form_is_the_same_however_it_is_cut(data: bytes, cuts: list[int], purpose: str) -> None:
    body = b'--b!\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose.encode()
    body += b'\r\n--b!\r\nContent-Disposition: form-data; name="file"; filename="in"\r\n\r\n' + data + b"\r\n--b!--\r\n"
    if b"\r\n--b!" in data or "\r\n--b!" in purpose:
        return
    parser, ends = _Parser(b"b!"), sorted({*(cut for cut in cuts if cut < len(body)), len(body)})
    for start, end in zip([0, *ends], ends, strict=False):
        parser.feed(body[start:end])
    parser.close()
    assert parser.take() == data
    assert (parser.form.fields, parser.form.filename, parser.nbytes) == ({"purpose": purpose}, "in", len(data))
    for cut in (0, len(body) // 2, len(body) - 10):
        with pytest.raises(InvalidRequest):  # noqa: PT012
            half = _Parser(b"b!")
            half.feed(body[:cut])
            half.close()


def test_records_are_json(tmp_path: Path) -> None:
    asyncio.run(Files(tmp_path, FilesConfig()).open_folder("o"))
    asyncio.run(Files(tmp_path, FilesConfig()).add("o", File("file-a", "ü", "batch", 1, 2)))
    assert json.loads((tmp_path / "o" / "file-a.json").read_bytes())["filename"] == "ü"
