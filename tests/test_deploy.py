"""What is in deploy/ is right as far as a machine without Docker, systemd or a GPU can tell."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from mball.server.cli import app
from mball.server.config import Config, json_schema, load_config
from mball.server.models.demo import CHAT_MODELS, EMBEDDING_MODEL

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
EXAMPLES = sorted((DEPLOY / "examples").glob("*.yaml"))
FIRST_TOKEN_S = 0.05
PIECES = 4


class FakeServer(BaseHTTPRequestHandler):
    """Two chat models, the second broken in the middle of every stream, and one that cannot chat."""

    protocol_version = "HTTP/1.1"
    asked: Counter[str]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": name} for name in ("good", "broken", "embedder")]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked[body["model"]] += bool(body.get("stream"))
        if body["model"] == "embedder":
            self.answer(400, {"error": {"message": "it embeds"}})
        elif not body.get("stream"):
            self.answer(200, {"choices": []})
        else:
            self.stream(body["model"])

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, model: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.say(json.dumps({"choices": [{"delta": {"role": "assistant"}}]}))
        time.sleep(FIRST_TOKEN_S)
        for _ in range(PIECES):
            self.say(json.dumps({"choices": [{"delta": {"content": "word "}}]}))
        if model == "broken":
            self.say(json.dumps({"error": {"message": "the worker died"}}))
        else:
            time.sleep(FIRST_TOKEN_S)
            self.say("[DONE]")

    def say(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (FakeServer,), {"asked": Counter()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield http
        finally:
            http.shutdown()
            thread.join(30)


def locust(server: ThreadingHTTPServer, *options: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    """The exit code, and the statistics by (type, name)."""
    command = [sys.executable, "-m", "locust", "-f", str(DEPLOY / "locust" / "locustfile.py"), "--headless", "--json"]
    host = f"http://127.0.0.1:{server.server_port}"
    done = subprocess.run(
        [*command, "--host", host, "--users", "4", "--spawn-rate", "4", "--run-time", "3s", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    stats = json.loads(done.stdout) if done.stdout.strip() else []
    return done.returncode, {(row["method"], row["name"]): row for row in stats}


def test_locust_measures_the_first_token_of_every_chat_model(server: ThreadingHTTPServer) -> None:
    _, stats = locust(server)
    for name in ("good", "broken"):
        first, whole = stats["first token", name], stats["chat", name]
        assert first["num_requests"] >= 1
        assert first["num_failures"] == 0
        assert first["min_response_time"] >= FIRST_TOKEN_S * 1000
        assert whole["num_requests"] >= first["num_requests"]
    good, first = stats["chat", "good"], stats["first token", "good"]
    assert good["num_failures"] == 0
    assert good["min_response_time"] >= 2 * FIRST_TOKEN_S * 1000
    assert stats["chat", "broken"]["num_failures"] == stats["chat", "broken"]["num_requests"]
    assert ("chat", "embedder") not in stats


def test_locust_asks_the_models_that_are_named(server: ThreadingHTTPServer) -> None:
    code, stats = locust(server, "--models", "good")
    assert code == 0
    assert {name for kind, name in stats if kind == "chat"} == {"good"}
    assert set(server.RequestHandlerClass.asked) == {"good"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_config_is_valid(example: Path) -> None:
    jsonschema.validate(yaml.safe_load(example.read_text()), json.loads(json_schema()))
    assert load_config(example).models


def test_the_demo_config_serves_the_demo_models_of_the_checkout() -> None:
    config = load_config(DEPLOY / "examples" / "demo.yaml")
    assert [model.name for model in config.models] == [*CHAT_MODELS, EMBEDDING_MODEL]
    for model in config.models:
        assert model.path.resolve() == ROOT / ".demo" / "models" / model.name


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) of each step, continued lines joined."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in steps]


def test_the_image_is_built_from_the_steps_of_make_setup() -> None:
    steps = dockerfile()
    targets = {arguments.rpartition(" AS ")[2] for name, arguments in steps if name == "FROM"}
    assert {"cpu", "gpu"} <= targets
    (install,) = [arguments for name, arguments in steps if name == "RUN" and "make setup" in arguments]
    variables = dict(word.split("=", 1) for word in shlex.split(install.partition("make setup")[2]))
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{name} +\?=", makefile, re.MULTILINE) for name in variables)
    assert set(variables["EXTRAS"].split(",")) <= set(extras())


def extras() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_the_image_copies_files_that_are_there_and_not_ignored() -> None:
    ignore = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().split()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        source
        for name, arguments in dockerfile()
        if name == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    for source in copied:
        assert (ROOT / source).exists()
        assert any(source == path or source.startswith(f"{path}/") for path in kept), source
    wanted = {"Makefile", "pyproject.toml", "README.md", "LICENSE", "constraints", "src"}
    assert wanted <= copied


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of mball in deploy/, by where it stands."""
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        if "command" in service:
            yield f"compose: {name}", service["command"]
    (command,) = [arguments for name, arguments in dockerfile() if name == "CMD"]
    yield "Dockerfile", json.loads(command)
    yield "systemd", shlex.split(unit()["Service"]["ExecStart"])[1:]


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign] - names of systemd are case-sensitive
    parser.read(DEPLOY / "systemd" / "mball.service")
    return parser


@pytest.mark.parametrize(("place", "command"), list(commands()))
def test_a_command_line_uses_options_that_exist(place: str, command: list[str]) -> None:
    words = [word for word in command if not word.startswith(("-", "/", "0"))]
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, place
    for option in (word.partition("=")[0] for word in command if word.startswith("--")):
        assert option in result.output, (place, option)


def test_the_compose_file_builds_targets_of_the_dockerfile() -> None:
    folder = DEPLOY / "docker"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    builds = [service["build"] for service in compose["services"].values() if "build" in service]
    assert {build["target"] for build in builds} == {"cpu", "gpu"}
    for build in builds:
        assert (folder / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
    images = {service["image"] for service in compose["services"].values()}
    assert images == {"mball:cpu", "mball:gpu"}
    served = compose["services"]["cpu"]["command"]
    assert [Path(word).name for word in served if word.startswith("/models/")] == [*CHAT_MODELS, EMBEDDING_MODEL]


def test_the_images_environment_names_settings() -> None:
    text = " ".join(arguments for name, arguments in dockerfile() if name == "ENV") + unit()["Service"]["Environment"]
    names = {name.lower() for name in re.findall(r"MBALL_(\w+)=", text)}
    assert names
    assert names <= set(Config.model_fields)
