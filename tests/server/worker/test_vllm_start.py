"""Where a start of vLLM went, and its server as a child that was forked before it was told anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mball.memory import control
from mball.memory.process import Hello
from mball.memory.spec import WorkerSpec
from mball.server.worker import vllm_process
from mball.server.worker.vllm_forked import ForkedServer
from mball.server.worker.vllm_start import stages_of

TIMES = {
    "init_device": (110.0, 111.0),
    "load_model": (111.0, 114.0),
    "determine_available_memory": (114.0, 114.5),
    "initialize_from_config": (115.0, 115.5),
    "compile_or_warm_up_model": (115.5, 120.0),
}


def test_a_start_is_told_by_its_stages() -> None:
    found = stages_of({"server_at": 104.0, "stages": TIMES}, began=100.0, healthy=121.0)
    assert found == {
        "import_s": 4.0,
        "engine_s": 6.0,
        "device_s": 1.0,
        "weights_s": 3.0,
        "kv_s": 1.0,
        "warm_up_s": 4.5,
        "serve_s": 1.0,
        "ready_s": 21.0,
    }
    numbers = {"baseline_bytes": 1, "weights_bytes": 2, "kv_bytes": 3, "image_bytes": 4}
    assert Hello.of({**numbers, "stages": found}).stages == found
    assert Hello.of(numbers).stages == {}


def forked(tmp_path: Path) -> ForkedServer:
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        given = os.read(told, 1 << 16)
        if not given:
            os._exit(0)
        (tmp_path / "given").write_bytes(given)
        signal.pause()
    os.close(told)
    return ForkedServer(pid, tell)


def test_a_forked_server_begins_when_it_is_told(tmp_path: Path) -> None:
    server = forked(tmp_path)
    assert server.begin(["--model", "x"], {"A": "b"}) is server
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(0.2)
    assert server.poll() is None
    server.terminate()
    assert server.wait(30) == -signal.SIGTERM
    assert server.poll() == -signal.SIGTERM
    server.kill()  # it is nobody's by now
    assert json.loads((tmp_path / "given").read_text()) == {"arguments": ["--model", "x"], "environment": {"A": "b"}}


def test_what_vllm_compiles_is_kept_by_model_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm_process.vllm_compat, "version", lambda: "0.32.0")
    first, second = (
        vllm_process.cache_folder(WorkerSpec("m", str(tmp_path / name / "llama")), tmp_path) for name in "ab"
    )
    assert first != second
    assert first.parent == second.parent == tmp_path / ".cache" / "mball" / "vllm" / "0.32.0"
    assert first.name.startswith("llama-")
    monkeypatch.setattr(vllm_process.vllm_compat, "version", lambda: "0.33.0")
    assert vllm_process.cache_folder(WorkerSpec("m", str(tmp_path)), tmp_path).parent.name == "0.33.0"


def test_a_zygote_of_an_interpreter_needs_nothing_but_the_standard_library_and_mball() -> None:
    """vLLM's has none of what MBALL depends on."""
    hidden = "structlog", "xxhash", "pydantic", "aiohttp", "httpx2"
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); import mball.server.worker.vllm_zygote"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_where_there_is_no_vllm_its_zygote_says_so_for_good() -> None:
    ours, theirs = control.pair()
    command = [sys.executable, "-m", "mball.server.worker.vllm_zygote", "--control-fd", str(theirs.fileno())]
    done = subprocess.run(command, pass_fds=[theirs.fileno()], check=False, timeout=120)
    theirs.close()
    assert done.returncode == 1
    said = json.loads(ours.recv(1 << 16))
    assert said["event"] == "failed"
    assert "has no vLLM: set engine_python" in said["error"]
    ours.close()


def test_the_engine_counts_its_threads_by_what_it_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    assert "MKL_NUM_THREADS" not in vllm_process._environment(WorkerSpec("m", "/m"), None)
