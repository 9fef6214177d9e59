"""What proves that a made model is whole: a manifest with the digest of each of its files, written last."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from mball.loader.manifest import MANIFEST_FILE as SHARDS_MANIFEST_FILE

MANIFEST_FILE = "manifest.json"
_CHUNK_BYTES = 4 << 20


def write(folder: Path, recipe: str) -> None:
    """Writes the manifest of all files in `folder`; `recipe` names how they were made."""
    files = {name: _entry(folder / name) for name in _names(folder)}
    text = json.dumps({"recipe": recipe, "files": files}, indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n")


def is_whole(folder: Path, recipe: str) -> bool:
    """Whether `folder` holds exactly the files that its manifest names, unchanged, made by `recipe`."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        return bool(
            manifest["recipe"] == recipe
            and sorted(manifest["files"]) == _names(folder)
            and all(_entry(folder / name) == entry for name, entry in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in files}
    return sorted(names - {MANIFEST_FILE, SHARDS_MANIFEST_FILE})


def _entry(path: Path) -> dict[str, int | str]:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
