"""MBALL itself for an engine's own interpreter, without what MBALL depends on."""

from __future__ import annotations

import os
from pathlib import Path

import mball

_ENTRY_POINTS = """\
[vllm.general_plugins]
mball_format = mball.loader.vllm_format:register
mball_kv = mball.server.worker.vllm_kv:register
mball_sleep = mball.memory.vllm_sleep:register
"""
"""As in pyproject.toml: vLLM finds plugins by the metadata of what can be imported."""


def search_path(folder: Path) -> str:
    """PYTHONPATH for a process of that interpreter: the folder, which is made, with MBALL in it, before what there is.

    So it has this very MBALL, installed there or not. Raises OSError.
    """
    metadata = folder / f"mball-{mball.__version__}.dist-info"
    metadata.mkdir(mode=0o700, parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mball\nVersion: {mball.__version__}\n")
    (metadata / "entry_points.txt").write_text(_ENTRY_POINTS)
    package = folder / "mball"
    package.unlink(missing_ok=True)
    package.symlink_to(Path(mball.__file__).parent.resolve(), target_is_directory=True)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
