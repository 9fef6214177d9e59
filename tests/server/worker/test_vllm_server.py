"""Whether vLLM's server has its engine forked, with a vLLM that is only pretended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mball

SERVER = """
import os
if __name__ == "__main__":
    names = ("VLLM_WORKER_MULTIPROC_METHOD", "MBALL_VLLM_FORK", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    print(*(os.environ.get(name, "-") for name in names), oct(os.umask(0)))
"""
FILES = {
    "platforms.py": "class current_platform:\n    is_cpu = staticmethod(lambda: True)\n",
    "entrypoints/openai/api_server.py": SERVER,
    "v1/engine/core.py": "",
    "v1/engine/async_llm.py": "",
    "v1/worker/cpu_worker.py": "",
}


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in ("", "entrypoints", "entrypoints/openai", "v1", "v1/engine", "v1/worker"):
        (tmp_path / "vllm" / folder / "__init__.py").touch()
    metadata = tmp_path / "vllm-0.32.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    return tmp_path


def served(vllm: Path, **environment: str) -> tuple[str, str]:
    """What its server saw of the environment, and what was said beside."""
    path = os.pathsep.join([str(vllm), str(Path(mball.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "mball.server.worker.vllm_server", "--model", "m"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.strip(), done.stderr


def test_its_engine_is_forked(vllm: Path) -> None:
    said, beside = served(vllm, OMP_NUM_THREADS="7")
    assert said == "fork 1 7 - 0o77"
    assert "not forked" not in beside


def test_no_library_begins_the_threads_that_it_was_given_while_all_is_imported(vllm: Path) -> None:
    (vllm / "vllm/v1/engine/core.py").write_text("import os\nprint(os.environ['OMP_NUM_THREADS'], end=' ')")
    assert served(vllm, OMP_NUM_THREADS="7")[0] == "1 fork 1 7 - 0o77"


def test_a_thread_that_a_fork_would_lose_has_it_spawned(vllm: Path) -> None:
    begins = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    (vllm / "vllm/v1/engine/core.py").write_text(begins)
    said, beside = served(vllm)
    assert said == "- - - - 0o77"
    assert "vLLM's engine is not forked, which takes some seconds more: it has threads after its imports" in beside


def test_who_wants_it_spawned_has_it_spawned(vllm: Path) -> None:
    assert served(vllm, VLLM_WORKER_MULTIPROC_METHOD="spawn")[0] == "spawn - - - 0o77"
