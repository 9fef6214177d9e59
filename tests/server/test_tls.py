"""HTTPS where the config has a certificate, and a clear refusal where that is not right."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from mball.server.config import load_config
from mball.server.run import bind

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates: not there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, its key, the key under a password, another's key, and a model that none asks for."""
    path = tmp_path_factory.mktemp("tls")
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=a"]
    for name in ("ours", "others"):
        words = [*made, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run(["openssl", *words], cwd=path, check=True, capture_output=True)
    locked = ["rsa", "-aes256", "-passout", "pass:secret", "-in", "ours.key", "-out", "locked.key"]
    subprocess.run(["openssl", *locked], cwd=path, check=True, capture_output=True)
    (path / "model").mkdir()
    (path / "model" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return path


def config_of(folder: Path, **tls: str) -> Path:
    path = folder / "mball.yaml"
    logs = str(folder / "logs")
    path.write_text(json.dumps({"models": ["model"], "zygote": False, "log_dir": logs, "tls": tls}))
    return path


@contextlib.contextmanager
def served(config: Path) -> Iterator[tuple[int, int]]:
    """Its port and its pid."""
    with bind("127.0.0.1", 0) as sock:
        command = [sys.executable, "-m", "mball", "serve", "--fd", str(sock.fileno()), "--config", str(config)]
        with (config.parent / "stderr").open("w") as log:
            process = subprocess.Popen(command, pass_fds=[sock.fileno()], stderr=log)
        try:
            yield sock.getsockname()[1], process.pid
        finally:
            process.terminate()
            process.wait(60)


def test_https_and_no_http(folder: Path) -> None:
    with served(config_of(folder, certfile="ours.pem", keyfile="ours.key")) as (port, _):
        trusting = ssl.create_default_context(cafile=str(folder / "ours.pem"))
        answer = httpx.get(f"https://127.0.0.1:{port}/health", verify=trusting, timeout=120)
        assert answer.json() == {"status": "ok"}
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"https://127.0.0.1:{port}/health", timeout=60)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)


def test_a_new_certificate_is_for_new_connections_and_a_broken_one_is_for_none(folder: Path) -> None:
    config = config_of(folder, certfile="now.pem", keyfile="now.key")
    (folder / "garbage.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    trusting = {name: ssl.create_default_context(cafile=str(folder / f"{name}.pem")) for name in ("ours", "others")}

    def put(certificate: str, key: str) -> None:
        shutil.copy(folder / f"{certificate}.pem", folder / "now.pem")
        shutil.copy(folder / f"{key}.key", folder / "now.key")

    def connected(port: int, name: str) -> http.client.HTTPSConnection:
        """By a handshake that trusts this certificate alone."""
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=trusting[name])
        connection.connect()
        return connection

    def reloaded(pid: int) -> bool:
        """What became of one; False: it was refused."""
        before = (folder / "stderr").read_text()
        os.kill(pid, signal.SIGHUP)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            said = (folder / "stderr").read_text().removeprefix(before)
            if "configuration re" in said:
                return "configuration reloaded" in said
            time.sleep(0.02)
        raise TimeoutError("no reload within 60 s")

    put("ours", "ours")
    with served(config) as (port, pid), contextlib.closing(connected(port, "ours")) as old:
        first = old.sock
        for certificate, key, now in (
            ("others", "ours", "ours"),
            ("garbage", "ours", "ours"),
            ("others", "others", "others"),
            ("ours", "others", "others"),
            ("ours", "ours", "ours"),
        ):
            put(certificate, key)
            assert reloaded(pid) == (certificate == key)
            connected(port, now).close()
            with pytest.raises(ssl.SSLCertVerificationError):
                connected(port, "others" if now == "ours" else "ours")
            old.request("GET", "/health")
            assert json.loads(old.getresponse().read()) == {"status": "ok"}
            assert old.sock is first, "a connection from before goes on"


@pytest.mark.parametrize(
    ("certfile", "keyfile"),
    [("ours.pem", "others.key"), ("ours.pem", "locked.key"), ("absent.pem", "ours.key"), ("ours.key", "ours.key")],
)
def test_what_is_no_certificate_is_refused_at_the_start(folder: Path, certfile: str, keyfile: str) -> None:
    config = config_of(folder, certfile=certfile, keyfile=keyfile)
    done = subprocess.run(
        [sys.executable, "-m", "mball", "serve", "--port", "0", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mball: tls: ")
    assert str(folder / certfile) in last


def test_paths_are_taken_from_the_config_s_folder(folder: Path) -> None:
    loaded = load_config(config_of(folder, certfile="ours.pem", keyfile="/elsewhere/key.pem"))
    assert loaded.tls is not None
    assert (loaded.tls.certfile, loaded.tls.keyfile) == (folder / "ours.pem", Path("/elsewhere/key.pem"))
