"""Random weights in the shape of a real architecture, for benchmarks: any size, as fast as the disk takes them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import xxhash

from mball.errors import ConfigError
from mball.server.models import architectures, shards, tokenizer
from mball.server.models.architectures import Architecture, Dtype

_STD = 0.02
# Not a divisor of any chunk or page size: a piece that lands in a wrong place never matches what belongs there.
_BLOCK_ELEMENTS = (4 << 20) + 1
_CARD = """# {name}

A {architecture} of random weights (seed {seed}), made by `mball models random` for benchmarks. What it answers means
nothing.
"""

Progress = Callable[[int, int], None]
"""Told the bytes written and the bytes in all."""


def make(
    architecture: Architecture,
    folder: Path,
    *,
    size_bytes: int,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    max_shard_bytes: int = 1 << 30,
    tokenizer_from: Path | None = None,
    progress: Progress = lambda _done, _total: None,
) -> int:
    """Writes the model to `folder`, which must not exist or be empty; returns the bytes of its tensors.

    The same arguments give the same bytes. Never more than some tens of MiB are in memory. Raises ConfigError for a
    folder in use, a size that no shape is near, or a tokenizer that is not there.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something already: remove it, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made.chmod(0o755)
        vocab_size = _round_up(tokenizer.copy(tokenizer_from, made)) if tokenizer_from else None
        shape = architectures.fit(architecture, size_bytes, dtype, vocab_size)
        _write_texts(made, folder.name, shape, dtype, seed, own_tokenizer=tokenizer_from is None)
        specs = list(architectures.tensors(shape, architectures.SAFETENSORS[dtype]))
        total = sum(spec.nbytes for spec in specs)
        _write_weights(made, specs, total, seed, dtype, max_shard_bytes, progress)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return total


def _round_up(vocab_size: int) -> int:
    return -(-vocab_size // 64) * 64


def _write_texts(
    folder: Path, name: str, shape: architectures.Shape, dtype: Dtype, seed: int, *, own_tokenizer: bool
) -> None:
    config = architectures.config(shape, dtype)
    generation = {}
    if own_tokenizer:
        tokenizer.make(folder, shape.vocab_size, config["max_position_embeddings"])
        generation = {"bos_token_id": tokenizer.BEGIN_ID, "eos_token_id": tokenizer.END_ID}
    (folder / "config.json").write_text(json.dumps(config | generation, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (folder / "README.md").write_text(_CARD.format(name=name, architecture=shape.architecture, seed=seed))


def _write_weights(
    folder: Path,
    specs: list[shards.TensorSpec],
    total: int,
    seed: int,
    dtype: Dtype,
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    shards.write(folder, specs, _Values(seed, dtype), max_shard_bytes=max_shard_bytes, wrote=wrote)


class _Values:
    """Gives each tensor its bytes: one random block over and over, begun at a place that the tensor's name chooses.

    Norms are all ones, as they are before training.
    """

    def __init__(self, seed: int, dtype: Dtype) -> None:
        kind = getattr(torch, dtype)
        generator = torch.Generator().manual_seed(seed)
        values = torch.empty(_BLOCK_ELEMENTS, dtype=torch.float32).normal_(0, _STD, generator=generator)
        self._itemsize = kind.itemsize
        self._block = shards.tensor_bytes(values.to(kind))
        self._ones = shards.tensor_bytes(torch.ones(16384, dtype=kind))

    def __call__(self, spec: shards.TensorSpec) -> Iterator[memoryview]:
        if len(spec.shape) == 1:
            yield self._ones[: spec.nbytes]
            return
        start = xxhash.xxh3_64_intdigest(spec.name.encode()) % _BLOCK_ELEMENTS * self._itemsize
        left = spec.nbytes
        while left:
            piece = self._block[start : start + left]
            yield piece
            left -= len(piece)
            start = 0
