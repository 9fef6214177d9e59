"""Keys: nothing without one, nothing that it may not do, and no more of it than its limits."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner
from yarl import URL

from mball.errors import ConfigError, RateLimited
from mball.server.cli import app
from mball.server.config import load_config
from mball.server.gateway.access import PUBLIC_PATHS, Key, Limits, digest, new_key
from mball.server.gateway.app import create_app
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Start
from tests.server.gateway.test_app import CHAT, body, error_of

USER, ADMIN = new_key()[0], new_key()[0]


def entry(key: str, name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "sha256": digest(key.encode()), **fields}


KEYS = [entry(USER, "user"), entry(ADMIN, "operator", admin=True)]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_without_keys_whoever_reaches_the_address_may(gateway: Start) -> None:
    running = await gateway(model("a"))
    async with running.http.get(f"{running.url}/mball/v1/state") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("mb-wrong"),
        bearer(""),
        {"authorization": f"Basic {USER}"},
        {"authorization": USER},
        {"x-api-key": "mb-wrong"},
        bearer(digest(USER.encode())),
        bearer(f"{USER}x"),
    ],
)
async def test_no_route_but_the_probes_answers_without_a_key(gateway: Start, headers: dict[str, str]) -> None:
    running = await gateway(model("a"), api_keys=KEYS)
    paths = list(create_app(running.manager, load_config()).openapi()["paths"])
    assert len(paths) > 10
    for path in [*paths, "/openapi.json", "/nothing"]:
        for method in ("GET", "POST"):
            async with running.http.request(method, running.url + path, headers=headers) as response:
                if path in PUBLIC_PATHS:
                    assert response.status != 401
                    continue
                assert response.status == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                if path.startswith("/v1/messages"):
                    answer = await response.json()
                    assert (answer["type"], answer["error"]["type"]) == ("error", "authentication_error")
                    continue
                assert (await error_of(response))["code"] == "invalid_api_key"


async def test_a_key_comes_as_openai_s_clients_or_as_anthropic_s_send_it(gateway: Start) -> None:
    running = await gateway(model("a"), api_keys=KEYS)
    for headers in (bearer(USER), {"authorization": f"bearer {USER}"}, {"x-api-key": USER}):
        async with running.http.post(running.url + CHAT, data=body("a"), headers=headers) as response:
            assert response.status == 200


async def test_moving_models_takes_an_operator_s_key(gateway: Start) -> None:
    running = await gateway(model("a"), api_keys=KEYS)
    for path in ("/mball/v1/state", "/mball/v1/models/a", "/mball/v1/nothing", "/metrics"):
        async with running.http.get(running.url + path, headers=bearer(USER)) as response:
            assert response.status == 403
            assert (await error_of(response))["code"] == "forbidden"
    async with running.http.post(f"{running.url}/mball/v1/models/a/load", headers=bearer(USER)) as response:
        assert response.status == 403
    assert running.state("a")["starts"] == 0
    async with running.http.get(f"{running.url}/mball/v1/state", headers=bearer(ADMIN)) as response:
        assert response.status == 200


async def test_an_operator_s_routes_are_at_their_own_address_alone(gateway: Start) -> None:
    running = await gateway(model("a"), api_keys=KEYS, admin={"port": 0})
    for path in ("/mball/v1/state", "/%6dball/v1/state", "/metrics"):
        for host in ("127.0.0.1", running.admin_url.removeprefix("http://")):
            headers = {**bearer(ADMIN), "host": host}
            async with running.http.get(URL(running.url + path, encoded=True), headers=headers) as response:
                assert response.status == 404
                assert "not found" in (await error_of(response))["message"]
        async with running.http.get(URL(running.admin_url + path, encoded=True), headers=bearer(ADMIN)) as response:
            assert response.status == 200
        async with running.http.get(running.admin_url + path, headers=bearer(USER)) as response:
            assert response.status == 403
    for url, status in ((running.url, 404), (running.admin_url, 200)):
        async with running.http.get(f"{url}/ui") as response:
            assert response.status == status
    for url in (running.url, running.admin_url):
        async with running.http.post(url + CHAT, data=body("a"), headers=bearer(USER)) as response:
            assert response.status == 200


async def test_a_key_goes_on_over_a_reload_with_what_it_has_under_way(gateway: Start) -> None:
    running = await gateway(model("a"), api_keys=[entry(USER, "user", limits={"max_in_flight": 1}), *KEYS[1:]])
    [key, _] = running.live.keys
    changed = [entry(USER, "renamed", limits={"max_in_flight": 2})]
    with key.request():
        running.live.apply(load_config(None, {"api_keys": changed}))
        assert [known.name for known in running.live.keys] == ["renamed"]
        async with running.http.get(f"{running.url}/v1/models", headers=bearer(ADMIN)) as response:
            assert response.status == 401
        with running.live.keys[0].request(), pytest.raises(RateLimited), running.live.keys[0].request():
            pass


def test_the_two_addresses_differ() -> None:
    with pytest.raises(ConfigError, match="give `admin` another"):
        load_config(None, {"port": 8000, "admin": {"port": 8000}})


async def test_an_adapter_is_for_those_keys_that_name_it(gateway: Start) -> None:
    given = model("a")
    worker = replace(given.worker, engine="vllm", engine_args={"lora_modules": ["a-formal=/f", "a-brief=/b"]})
    served = {"path": "/m/a", "engine": "vllm", "engine_args": {"lora_modules": ["a-formal=/f", "a-brief=/b"]}}
    keys = [entry(USER, "user", models=["a", "a-brief"])]
    running = await gateway(replace(given, worker=worker), models=[served], api_keys=keys)
    async with running.http.get(f"{running.url}/v1/models", headers=bearer(USER)) as response:
        assert [card["id"] for card in (await response.json())["data"]] == ["a", "a-brief"]
    for name, status in (("a-brief", 200), ("a-formal", 404)):
        async with running.http.post(running.url + CHAT, data=body(name), headers=bearer(USER)) as response:
            assert response.status == status


async def test_models_that_a_key_is_not_for_are_not_there(gateway: Start) -> None:
    keys = [entry(USER, "user", models=["a"])]
    running = await gateway(model("a"), model("b"), models=[{"path": "/m/a"}, {"path": "/m/b"}], api_keys=keys)
    async with running.http.get(f"{running.url}/v1/models", headers=bearer(USER)) as response:
        assert [card["id"] for card in (await response.json())["data"]] == ["a"]
    async with running.http.get(f"{running.url}/v1/models/b", headers=bearer(USER)) as response:
        assert response.status == 404
    async with running.http.post(running.url + CHAT, data=body("b"), headers=bearer(USER)) as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "model_not_found"
    assert running.state("b")["starts"] == 0


async def test_requests_over_a_key_s_limit_are_told_when_to_come_again(gateway: Start) -> None:
    limits = {"max_in_flight": 1}
    running = await gateway(model("a", Knobs(token_s=0.5)), api_keys=[entry(USER, "user", limits=limits), *KEYS[1:]])
    first = asyncio.create_task(running.http.post(running.url + CHAT, data=body("a"), headers=bearer(USER)))
    await running.until(lambda: running.state("a")["in_flight"] == 1)
    async with running.http.post(running.url + CHAT, data=body("a"), headers=bearer(USER)) as response:
        assert response.status == 429
        assert int(response.headers["retry-after"]) >= 1
        assert (await error_of(response))["type"] == "rate_limit_error"
    async with running.http.post(running.url + CHAT, data=body("a"), headers=bearer(ADMIN)) as response:
        assert response.status == 200
    assert (await first).status == 200
    async with running.http.post(running.url + CHAT, data=body("a"), headers=bearer(USER)) as response:
        assert response.status == 200


def test_a_minute_s_requests_come_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mball.server.gateway.access.time.monotonic", lambda: now)
    key = Key("k", "", limits=Limits(requests_per_minute=30))
    for _ in range(30):
        with key.request():
            pass
    with pytest.raises(RateLimited) as refused, key.request():
        pass
    assert refused.value.retry_after_s == pytest.approx(2.0)
    now += 2.0
    with key.request():
        pass
    with pytest.raises(RateLimited), key.request():
        pass


def test_tokens_of_a_minute_are_counted_as_they_were_used(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mball.server.gateway.access.time.monotonic", lambda: now)
    key = Key("k", "", limits=Limits(tokens_per_minute=600))
    with key.request():
        key.spend(620)
    with pytest.raises(RateLimited, match="600 tokens a minute") as refused, key.request():
        pass
    assert refused.value.retry_after_s == pytest.approx(2.1)
    now += 2.2
    with key.request():
        pass


async def test_tokens_count_by_usage_or_by_what_is_seen(gateway: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"tokens_per_minute": 12}
    running = await gateway(model("a", Knobs(tokens=9)), api_keys=[entry(USER, "user", limits=limits)])
    spent: list[int] = []
    spend = Key.spend
    monkeypatch.setattr(Key, "spend", lambda key, tokens: (spent.append(tokens), spend(key, tokens)))
    for stream in (False, True):
        data = body("a", stream=stream)
        async with running.http.post(running.url + CHAT, data=data, headers=bearer(USER)) as response:
            assert response.status == 200
            events = (await response.read()).count(b"data: ")
    assert events > 9
    assert spent == [10, len(data) // 4 + events]
    async with running.http.post(running.url + CHAT, data=body("a"), headers=bearer(USER)) as response:
        assert response.status == 429
        assert int(response.headers["retry-after"]) > 20


async def test_what_is_left_of_a_key_s_limits_stands_in_every_answer(
    gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"requests_per_minute": 2, "tokens_per_minute": 600}
    running = await gateway(model("a", Knobs(tokens=9)), api_keys=[entry(USER, "user", limits=limits), *KEYS[1:]])
    now = 100.0
    monkeypatch.setattr("mball.server.gateway.access.time", SimpleNamespace(monotonic=lambda: now))

    async def told(key: str, stream: bool = False) -> tuple[int, list[str]]:
        data = body("a", stream=stream)
        async with running.http.post(running.url + CHAT, data=data, headers=bearer(key)) as response:
            await response.read()
            found = {name: value for name, value in response.headers.items() if name.lower().startswith("x-ratelimit")}
            assert not found or len(found) == 6
            names = [f"{name}-{of}" for of in ("requests", "tokens") for name in ("limit", "remaining", "reset")]
            return response.status, [found.get(f"x-ratelimit-{name}", "") for name in names]

    assert await told(ADMIN) == (200, [""] * 6)
    assert await told(USER) == (200, ["2", "1", "30s", "600", "600", "0ms"])
    assert await told(USER, stream=True) == (200, ["2", "0", "1m0s", "600", "590", "1s"])
    status, refused = await told(USER)
    assert (status, refused[:3]) == (429, ["2", "0", "1m0s"])
    now += 45.0
    status, again = await told(USER)
    assert (status, again[:3]) == (200, ["2", "0", "45s"])


async def test_a_full_key_s_wait_is_what_its_requests_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mball.server.gateway.access.time.monotonic", lambda: now)
    key = Key("k", "", limits=Limits(max_in_flight=2))
    with key.request():
        now += 30.0
    with key.request(), key.request(), pytest.raises(RateLimited) as refused, key.request():
        pass
    assert refused.value.retry_after_s == pytest.approx(15.0)


def test_a_key_that_is_made_is_let_in_and_stands_nowhere_in_the_config() -> None:
    result = CliRunner().invoke(app, ["keys", "new", "ops", "--admin"])
    assert result.exit_code == 0
    key = result.stderr.rsplit(maxsplit=1)[-1]
    assert key not in result.stdout
    [made] = yaml.safe_load(result.stdout)["api_keys"]
    assert made == {"name": "ops", "sha256": digest(key.encode()), "admin": True}


def test_a_key_for_a_model_that_is_not_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model is called so"):
        load_config(None, {"models": [{"path": "/m/a"}], "api_keys": [entry(USER, "user", models=["b"])]})
