"""A small client of a running server, for the command line and the demo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx

from mball.errors import MballError

DEFAULT_URL = "http://127.0.0.1:8000"
_PROBE_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 3600.0


class ServerUnreachable(MballError):
    """No server answers at the address."""


class ServerRefused(MballError):
    """The server answered with an error."""


def key_headers() -> dict[str, str]:
    """With the API key that the environment's MBALL_API_KEY names, where it does."""
    key = os.environ.get("MBALL_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


class Client:
    """Raises ServerUnreachable or ServerRefused from every call."""

    def __init__(self, url: str = DEFAULT_URL) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers=key_headers(),
            timeout=httpx.Timeout(_PROBE_TIMEOUT_S, read=_ANSWER_TIMEOUT_S),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def state(self) -> dict[str, Any]:
        """What GET /mball/v1/state says."""
        return self._request("GET", "/mball/v1/state")

    def models(self) -> list[str]:
        return [card["id"] for card in self._request("GET", "/v1/models")["data"]]

    def model(self, name: str) -> dict[str, Any]:
        """One model's state, with its engine's own under `engine`."""
        return self._request("GET", f"/mball/v1/models/{name}")

    def move(self, model: str, verb: str) -> dict[str, Any]:
        """`verb` is load, unload, pin or unpin; the model's state after it."""
        return self._request("POST", f"/mball/v1/models/{model}/{verb}")

    def balloon(self, model: str, nbytes: int) -> dict[str, Any]:
        """The model does without so many bytes; its state after it."""
        return self._request("POST", f"/mball/v1/models/{model}/balloon", json={"bytes": nbytes})

    def events(self, recent: int) -> Iterator[dict[str, Any]]:
        """What happens, after the last `recent`, until the server ends. Where it dropped this reader it goes on after
        what was read; what was lost comes as an event of kind `missed`."""
        last_id: str | None = None
        while True:
            kind = ""
            headers = {} if last_id is None else {"last-event-id": last_id}
            try:
                with self._http.stream(
                    "GET", "/mball/v1/events", params={"recent": recent}, headers=headers
                ) as response:
                    if response.is_error:
                        response.read()
                        raise ServerRefused(_message(response))
                    for line in response.iter_lines():
                        name, _, value = line.partition(": ")
                        if name == "event":
                            kind = value
                        elif name == "id":
                            last_id = value
                        elif name == "data" and kind != "dropped":
                            yield {"kind": kind, **json.loads(value)}
            except httpx.HTTPError as error:
                raise self._unreachable(error) from None
            if kind != "dropped":
                return

    def chat(self, model: str, messages: list[dict[str, str]], **options: Any) -> Iterator[str]:
        """The pieces of a streamed answer's text."""
        body = {"model": model, "messages": messages, "stream": True, **options}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise ServerRefused(_message(response))
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ServerRefused(event["error"]["message"])
                    for choice in event["choices"]:
                        if text := choice["delta"].get("content"):
                            yield text
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise ServerRefused(_message(response))
        answer: dict[str, Any] = response.json()
        return answer

    def _unreachable(self, error: httpx.HTTPError) -> ServerUnreachable:
        return ServerUnreachable(f"no answer from {self.url} ({error}); start it with `mball serve`, or name --url")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.request.url}: HTTP {response.status_code}"
