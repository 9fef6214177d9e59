"""Digests of a model's shards, kept beside it: what was read is what was written.

The xxh3 of every shard's header, and of every extent (`EXTENT_BYTES`) of its data section, so that an image of the
data sections is checked by the same digests. They guard against rot and half-done copies, not against an attacker,
who would write another manifest.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from mball.errors import BadManifest, DigestMismatch
from mball.loader.checkpoint import Checkpoint
from mball.loader.plan import Extent
from mball.loader.reader import Progress, Source, read
from mball.loader.verify import Verifier, mismatch
from mball.units import MiB

MANIFEST_FILE = "mball-manifest.json"
EXTENT_BYTES = 16 * MiB
_VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardDigests:
    """Of one shard: its size, and the xxh3_64 of its header and of each extent of its data section, in hex."""

    size_bytes: int
    header: str
    extents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The digests of all shards, by file name."""

    extent_bytes: int
    shards: Mapping[str, ShardDigests]

    @classmethod
    def make(
        cls,
        checkpoint: Checkpoint,
        *,
        threads: int = 2,
        extent_bytes: int = EXTENT_BYTES,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Manifest:
        """Read every shard and digest it. Raises ReadError, Cancelled, TimeoutError."""
        lanes = _Digests(extent_bytes)
        read(
            list(_extents(checkpoint, extent_bytes)),
            Source(checkpoint),
            lanes.lane,
            threads=threads,
            progress=progress,
            cancel=cancel,
        )
        shards = {
            shard.path.name: ShardDigests(
                shard.size_bytes,
                _header_digest(checkpoint, number),
                tuple(lanes.found[number, extent] for extent in range(-(-shard.data_bytes // extent_bytes))),
            )
            for number, shard in enumerate(checkpoint.shards)
        }
        return cls(extent_bytes, shards)

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Manifest:
        """The manifest beside the checkpoint, and that it is of these shards, headers included.

        Raises BadManifest, or DigestMismatch for a header.
        """
        path = manifest_path(checkpoint)
        try:
            parsed = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise BadManifest(
                f"is not there: make it by `mball models manifest {path.parent}`", file=str(path)
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise BadManifest(f"cannot be read: {error}", file=str(path)) from error
        manifest = _parsed(parsed, str(path))
        manifest._check(checkpoint, str(path))
        return manifest

    def write(self, checkpoint: Checkpoint) -> Path:
        """Put it beside the checkpoint, whole or not at all; its path. Raises OSError."""
        path = manifest_path(checkpoint)
        begun = path.with_name(f"{path.name}.tmp")
        begun.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n")
        begun.replace(path)
        return path

    def verifier(self, checkpoint: Checkpoint) -> Verifier:
        """What `verify=` of the loader takes. `checkpoint` is the one that `open` was given."""
        digests = [self.shards[shard.path.name].extents for shard in checkpoint.shards]
        return Verifier(checkpoint, self.extent_bytes, digests)

    def check(self, checkpoint: Checkpoint, found: Manifest) -> None:
        """Raises DigestMismatch for the first extent that `found` has otherwise."""
        for number, shard in enumerate(checkpoint.shards):
            pairs = zip(self.shards[shard.path.name].extents, found.shards[shard.path.name].extents, strict=True)
            for extent, (wanted, digest) in enumerate(pairs):
                if wanted != digest:
                    raise mismatch(checkpoint, number, extent, self.extent_bytes)

    def _check(self, checkpoint: Checkpoint, path: str) -> None:
        for number, shard in enumerate(checkpoint.shards):
            digests = self.shards.get(shard.path.name)
            if digests is None:
                raise BadManifest(f"has no digests of {shard.path.name}: make it anew", file=path)
            wanted = -(-shard.data_bytes // self.extent_bytes)
            if digests.size_bytes != shard.size_bytes:
                raise BadManifest(
                    f"is of a {shard.path.name} of {digests.size_bytes} bytes, this one has {shard.size_bytes}",
                    file=path,
                )
            if digests.header != _header_digest(checkpoint, number):
                raise DigestMismatch("its header is not the one that the manifest was made of", file=str(shard.path))
            if len(digests.extents) != wanted:
                raise BadManifest(
                    f"has {len(digests.extents)} digests of {shard.path.name}, which has {wanted} extents", file=path
                )


class _Digests:
    """Digests of whole extents by shard and number; a lane for each reader thread."""

    def __init__(self, extent_bytes: int) -> None:
        self.found: dict[tuple[int, int], str] = {}
        self._extent_bytes = extent_bytes

    def lane(self) -> _DigestLane:
        return _DigestLane(self.found, self._extent_bytes)


class _DigestLane:
    def __init__(self, found: dict[tuple[int, int], str], extent_bytes: int) -> None:
        self._found = found
        self._scratch = memoryview(bytearray(extent_bytes))

    def buffer(self, extent: Extent) -> memoryview:
        return self._scratch[: extent.nbytes]

    def commit(self, extent: Extent) -> None:
        self._found[extent.shard, extent.offset] = xxhash.xxh3_64_hexdigest(self._scratch[: extent.nbytes])

    def finish(self) -> None:
        pass


def manifest_path(checkpoint: Checkpoint) -> Path:
    """In the model's folder; beside a single file, with its name in front."""
    path = checkpoint.path
    return path / MANIFEST_FILE if path.is_dir() else path.with_name(f"{path.name}.{MANIFEST_FILE}")


def _extents(checkpoint: Checkpoint, extent_bytes: int) -> Iterator[Extent]:
    """All of the data sections; `offset` is the extent's number in its shard."""
    for number, shard in enumerate(checkpoint.shards):
        for extent, start in enumerate(range(shard.data_start, shard.size_bytes, extent_bytes)):
            yield Extent(number, start, min(extent_bytes, shard.size_bytes - start), extent)


def _header_digest(checkpoint: Checkpoint, number: int) -> str:
    with checkpoint.shards[number].path.open("rb") as file:
        return xxhash.xxh3_64_hexdigest(file.read(checkpoint.shards[number].data_start))


def _parsed(parsed: Any, path: str) -> Manifest:
    try:
        if parsed["version"] != _VERSION:
            raise BadManifest(f"has version {parsed['version']!r}, this is {_VERSION}: make it anew", file=path)
        shards = {
            str(name): ShardDigests(int(found["size_bytes"]), str(found["header"]), tuple(map(str, found["extents"])))
            for name, found in parsed["shards"].items()
        }
        manifest = Manifest(int(parsed["extent_bytes"]), shards)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadManifest(f"is not a manifest of digests: {error!r}", file=path) from error
    if manifest.extent_bytes < 1:
        raise BadManifest(f"has extents of {manifest.extent_bytes} bytes", file=path)
    return manifest
