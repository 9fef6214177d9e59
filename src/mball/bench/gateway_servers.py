"""What `mball bench gateway` measures, each until its context ends: the worker itself, and before it MBALL, a uvicorn
that only forwards, and the LiteLLM proxy."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mball.bench.contenders import Cannot
from mball.bench.gateway_client import asks
from mball.server.run import bind

DIRECT, MBALL, BARE, LITELLM = "worker, directly", "mball", "uvicorn that only forwards", "litellm"
_START_S = 180.0
_INSTALL_S = 900.0
_REQUIREMENT = "litellm[proxy]"


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens, the key it wants, and the process whose memory is its own."""

    port: int
    key: str
    pid: int


@contextlib.contextmanager
def direct() -> Iterator[Server]:
    with bind("127.0.0.1", 0) as sock:
        command = [sys.executable, "-m", "mball.bench.gateway_worker", "--port-fd", str(sock.fileno())]
        with _running(command, sock.getsockname()[1], "no key", fds=[sock.fileno()]) as server:
            yield server


@contextlib.contextmanager
def mball() -> Iterator[Server]:
    key = secrets.token_urlsafe(16)
    with _ours("mball.bench.gateway_mball", key, f"--key={key}") as server:
        yield server


@contextlib.contextmanager
def bare() -> Iterator[Server]:
    with _ours("mball.bench.gateway_bare", "no key") as server:
        yield server


@contextlib.contextmanager
def _ours(module: str, key: str, *arguments: str) -> Iterator[Server]:
    with bind("127.0.0.1", 0) as sock, tempfile.TemporaryDirectory(prefix="mball-bench-") as folder:
        command = [sys.executable, "-m", module, "--fd", str(sock.fileno()), "--folder", folder, *arguments]
        with _running(command, sock.getsockname()[1], key, fds=[sock.fileno()]) as server:
            yield server


@contextlib.contextmanager
def litellm(venv: Path, worker_port: int) -> Iterator[Server]:
    """One process of it, with a key, its logs on the screen turned off."""
    key = "sk-" + secrets.token_urlsafe(16)
    with tempfile.TemporaryDirectory(prefix="mball-bench-") as folder:
        config = Path(folder, "config.yaml")
        params = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{worker_port}/v1", "api_key": "none"}
        models = [{"model_name": "bench", "litellm_params": params}]
        config.write_text(yaml.safe_dump({"model_list": models, "general_settings": {"master_key": key}}))
        with bind("127.0.0.1", 0) as sock:
            port: int = sock.getsockname()[1]
        command = [str(venv / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        with _running([*command, "--num_workers", "1"], port, key) as server:
            yield server


def install_litellm(venv: Path) -> str:
    """Its version, installed into a venv of its own where it is not yet. Raises Cannot."""
    try:
        if not (venv / "bin" / "litellm").exists():
            subprocess.run([sys.executable, "-m", "venv", venv], check=True, capture_output=True, timeout=_INSTALL_S)
            install = [str(venv / "bin" / "pip"), "install", "-q", _REQUIREMENT]
            subprocess.run(install, check=True, capture_output=True, timeout=_INSTALL_S)
        ask = "import importlib.metadata as m; print(m.version('litellm'))"
        said = subprocess.run([venv / "bin" / "python", "-c", ask], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        said_last = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        raise Cannot(f"pip can't install {_REQUIREMENT} here: {said_last[-1] if said_last else error}") from None
    return said.stdout.decode().strip()


@contextlib.contextmanager
def _running(command: Sequence[str], port: int, key: str, *, fds: Sequence[int] = ()) -> Iterator[Server]:
    environment = {**os.environ, "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, pass_fds=fds, stdout=said, stderr=said, env=environment)
        try:
            _wait(process, port, key)
            yield Server(port, key, process.pid)
        except Cannot as error:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise Cannot(f"{error}{': ' if last else ''}{''.join(last)}") from None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, key: str) -> None:
    """Until it answers a request."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Cannot(f"it ended with {process.returncode}")
        try:
            request = urllib.request.Request(url, asks(stream=False), headers)
            with urllib.request.urlopen(request, timeout=_START_S) as answer:
                answer.read()
            return
        except urllib.error.HTTPError as error:
            raise Cannot(f"it answered {error.code}: {error.read()[:300]!r}") from None
        except OSError:
            # Another's server tells nobody when it listens, but when it ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    raise Cannot(f"it does not answer after {_START_S:.0f} s")
