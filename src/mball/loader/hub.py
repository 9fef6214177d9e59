"""A path, or a model's id on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from mball.errors import SourceUnavailable

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json"]


def resolve(path_or_hub_id: str | Path) -> Path:
    """The path itself where it is there, or can't be an id; else the hub's snapshot, downloaded unless it is cached.

    Offline (HF_HUB_OFFLINE) the cache alone is asked. Raises SourceUnavailable.
    """
    path = Path(path_or_hub_id)
    if path.exists() or not _ID.fullmatch(str(path_or_hub_id)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        raise SourceUnavailable(
            f"{path_or_hub_id} is no file or folder here, and the Hugging Face hub did not give it: {error}"
        ) from error
