"""A defective model has its own clear error, and the others go on answering."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import yaml

from mball.server.run import Running, running_server
from tests.e2e.conftest import CHAT_MODELS

GOOD, _, LARGE = CHAT_MODELS
HELLO = [{"role": "user", "content": "Say hello."}]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    shard = shards(folder)[0]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)


def overlap(folder: Path) -> None:
    shard = shards(folder)[0]
    data = shard.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__" and header[name]["data_offsets"][0] > 0)
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin - 2, end - 2]
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def lose_a_shard(folder: Path) -> None:
    shards(folder)[-1].unlink()


def only_pickles(folder: Path) -> None:
    for file in (*shards(folder), *folder.glob("*.index.json")):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def bring_code(folder: Path) -> None:
    """Of a kind that only its own Python knows; it leaves a mark when it runs."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "architectures": ["Homemade"]}
    config["auto_map"] = {"AutoConfig": "homemade.HomemadeConfig", "AutoModelForCausalLM": "homemade.Homemade"}
    (folder / "config.json").write_text(json.dumps(config))
    marks = f"open({str(folder / RAN)!r}, 'w')"
    (folder / "homemade.py").write_text(
        f"{marks}\nfrom transformers import LlamaConfig as HomemadeConfig, LlamaForCausalLM as Homemade\n"
    )


RAN = "its code ran"

DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "safetensors"),
    "overlapping": (overlap, "overlap"),
    "incomplete": (lose_a_shard, "safetensors"),
    "pickled": (only_pickles, r"\.bin"),
    "code": (bring_code, "trust_remote_code"),
}


@pytest.fixture(scope="module")
def server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    for name, (damage, _) in DEFECTS.items():
        shutil.copytree(models_dir / GOOD, folder / name)
        damage(folder / name)
    (folder / "empty").mkdir()
    paths = [models_dir / GOOD, models_dir / LARGE, *(folder / name for name in (*DEFECTS, "empty", "absent"))]
    models = [{"path": str(path), "kv_cache_memory_bytes": "64MiB"} for path in paths]
    models[1]["resident_layers"] = "99"  # all: it is not to stream
    config = folder / "mball.yaml"
    config.write_text(yaml.safe_dump({"models": models, "device_memory_bytes": "500MiB"}))
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running_server(["--config", str(config)], log=log) as running:
        yield running
    assert not list(folder.rglob(RAN)), "Python of a model's folder ran, and nobody had allowed it"


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def answers(client: openai.OpenAI) -> bool:
    return bool(client.chat.completions.create(model=GOOD, messages=HELLO, max_tokens=4).choices[0].message.content)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named_and_the_others_answer(client: openai.OpenAI, name: str) -> None:
    assert answers(client)
    with pytest.raises(openai.InternalServerError, match=DEFECTS[name][1]) as error:
        client.chat.completions.create(model=name, messages=HELLO)
    assert error.value.status_code == 503
    assert error.value.code == "model_failed"
    assert name in str(error.value)
    assert answers(client)


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_that_is_no_model(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.InternalServerError, match=name):
        client.chat.completions.create(model=name, messages=HELLO)
    assert answers(client)


def test_a_model_that_does_not_fit_says_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match=r"MiB.*500 MiB") as error:
        client.chat.completions.create(model=LARGE, messages=HELLO)
    assert error.value.code == "model_does_not_fit"
    assert answers(client)


def test_a_port_in_use(models_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "mball", "serve", str(models_dir / GOOD), "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}: Address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr
