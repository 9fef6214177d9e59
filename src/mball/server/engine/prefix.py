"""Names for blocks of KV: a block's key says what its keys and values were computed from, all of it.

A key is a SHA-256 over the key before it and the block's tokens; the first one's is over the model and the tenant. So
equal keys mean equal tokens before and in the block, in the same model, for the same tenant.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from mball.errors import BadManifest, DigestMismatch
from mball.loader.checkpoint import Checkpoint
from mball.loader.manifest import Manifest
from mball.loader.sampled import sampled
from mball.server.engine.kv_cache import KVGeometry
from mball.swap.place import digest

_LAYOUT = "block, layer, key or value, token, head, dim: 1"
"""How a block's numbers are laid out, and computed."""


class Chain:
    """The keys of one sequence's full blocks, made as they are asked for. `root` is the tenant's in this model."""

    __slots__ = ("_block_size", "_keys", "root")

    def __init__(self, root: bytes, block_size: int) -> None:
        self.root = root
        self._block_size = block_size
        self._keys: list[bytes] = []

    def keys(self, tokens: Sequence[int], count: int) -> list[bytes]:
        """Of the first `count` blocks; `tokens` reach that far, and only grow."""
        size = self._block_size
        for number in range(len(self._keys), count):
            parent = self._keys[-1] if self._keys else self.root
            block = array("I", tokens[number * size : (number + 1) * size])
            self._keys.append(hashlib.sha256(parent + block.tobytes()).digest())
        return self._keys[:count]


def root(model: bytes, cache_salt: str | None) -> bytes:
    """Where a tenant's chains begin: without a salt all share one."""
    return digest(model, "" if cache_salt is None else f"salt {cache_salt}")


def identity(checkpoint: Checkpoint, geometry: KVGeometry, block_size: int, device_type: str) -> bytes:
    """SHA-256 that names a model's content, and how its KV is computed and laid out. Reads a few KiB of each shard.

    Content is what the manifest says where there is one; else the headers, samples of the data, sizes and times of
    change. The name of a model and its folder do not count. Raises ReadError.
    """
    shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, block_size)
    parts = [_LAYOUT, device_type, str(geometry.dtype), repr(shape), *_content(checkpoint)]
    config = checkpoint.path / "config.json"
    return digest(*parts, config.read_bytes() if config.is_file() else b"")


def _content(checkpoint: Checkpoint) -> list[str]:
    try:
        manifest = Manifest.open(checkpoint)
    except (BadManifest, DigestMismatch):
        return [sampled(shard) for shard in checkpoint.shards]
    return [
        f"{name} {shard.size_bytes} {shard.header} {' '.join(shard.extents)}"
        for name, shard in sorted(manifest.shards.items())
    ]
