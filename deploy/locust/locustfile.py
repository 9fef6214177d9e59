"""Load on a running server: streamed chats over all its models, with the time to the first token as its own metric.

    locust -f deploy/locust/locustfile.py --host http://127.0.0.1:8000
    locust -f deploy/locust/locustfile.py --host http://127.0.0.1:8000 --headless --users 16 --run-time 60s

In the statistics a `chat` is a whole answer and a `first token` the wait for its beginning, both by model.
"""

from __future__ import annotations

import json
import random
import time
from argparse import ArgumentParser
from typing import Any

import requests
from locust import User, between, events, task
from locust.env import Environment
from locust.exception import StopTest

PROMPTS = (
    "Why is the sky blue?",
    "Name three things to see in Paris.",
    "Write two sentences about a cat who learns to swim.",
    "What is the difference between a lake and a sea?",
)
TIMEOUT_S = 600


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser, **_: Any) -> None:
    parser.add_argument("--models", default="", help="Models to ask, with commas; all that can chat by default.")
    parser.add_argument("--max-tokens", type=int, default=64, help="Tokens of an answer.")


@events.test_start.add_listener
def choose_models(environment: Environment, **_: Any) -> None:
    """Takes the models that are named, or asks each that is served for one token: embedding models refuse."""
    options = environment.parsed_options
    names = [name for name in options.models.split(",") if name]
    if not names:
        listed = requests.get(f"{environment.host}/v1/models", timeout=TIMEOUT_S)
        listed.raise_for_status()
        names = [card["id"] for card in listed.json()["data"] if can_chat(environment.host or "", card["id"])]
    if not names:
        raise StopTest(f"{environment.host} serves no model that can chat")
    Chat.models = names
    Chat.max_tokens = options.max_tokens


def can_chat(host: str, model: str) -> bool:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return requests.post(f"{host}/v1/chat/completions", json=body, timeout=TIMEOUT_S).ok


class Chat(User):
    """Asks one model after the other, at random."""

    wait_time = between(0.1, 1.0)
    models: list[str] = []  # noqa: RUF012 - filled once, when the test starts
    max_tokens = 64

    def on_start(self) -> None:
        self.session = requests.Session()

    def on_stop(self) -> None:
        self.session.close()

    @task
    def chat(self) -> None:
        model = random.choice(self.models)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": random.choice(PROMPTS)}],
            "max_tokens": self.max_tokens,
            "stream": True,
        }
        started = time.perf_counter()
        first_s: float | None = None
        finished = False
        failure: Exception | None = None
        try:
            url = f"{self.host or self.environment.host}/v1/chat/completions"
            with self.session.post(url, json=body, stream=True, timeout=TIMEOUT_S) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if not line.startswith(b"data: "):
                        continue
                    if line == b"data: [DONE]":
                        finished = True
                        break
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    if first_s is None and any(choice["delta"].get("content") for choice in event["choices"]):
                        first_s = time.perf_counter() - started
            if not finished:
                raise RuntimeError("the stream ended before its end was said")
        except (requests.RequestException, RuntimeError, ValueError, KeyError) as error:
            failure = error
        self.report("chat", model, time.perf_counter() - started, failure)
        if first_s is not None:
            self.report("first token", model, first_s, None)

    def report(self, kind: str, model: str, seconds: float, failure: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=model,
            response_time=seconds * 1000,
            response_length=0,
            exception=failure,
            context=self.context(),
        )
