"""Equal keys mean equal tokens before and in the block, of one model, for one tenant."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from mball.loader.checkpoint import Checkpoint
from mball.loader.manifest import Manifest
from mball.server.engine.kv_cache import KVGeometry
from mball.server.engine.prefix import Chain, identity, root
from tests.server.engine.driving import ModelDir

GEOMETRY = KVGeometry(3, 2, 8, torch.float32)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=24)


@given(first=TOKENS, second=TOKENS, size=st.integers(1, 5))
def test_keys_are_equal_where_all_tokens_so_far_are(first: list[int], second: list[int], size: int) -> None:
    one = Chain(b"r", size).keys(first, len(first) // size)
    two = Chain(b"r", size).keys(second, len(second) // size)
    for number, (a, b) in enumerate(zip(one, two, strict=False), 1):
        assert (a == b) is (first[: number * size] == second[: number * size])
    assert len(set(one)) == len(one), "the same block at another place has another key"


@given(tokens=TOKENS, size=st.integers(1, 5))
def test_a_chain_grows_with_its_tokens(tokens: list[int], size: int) -> None:
    chain, grown = Chain(b"r", size), []
    for length in range(len(tokens) + 1):
        grown = chain.keys(tokens[:length], length // size)
    assert grown == Chain(b"r", size).keys(tokens, len(tokens) // size)
    assert chain.keys(tokens, 0) == []


def test_roots_are_one_a_tenant_and_model() -> None:
    roots = [root(model, salt) for model in (b"m", b"n") for salt in (None, "", "a", "salt a")]
    assert len(set(roots)) == len(roots)
    assert root(b"m", "a") == root(b"m", "a")


def test_an_identity_is_the_content_and_how_it_is_laid_out(model_dir: ModelDir, tmp_path: Path) -> None:
    path = Path(shutil.copytree(model_dir("llama"), tmp_path / "m", copy_function=shutil.copy2))

    def found(where: Path = path, geometry: KVGeometry = GEOMETRY, size: int = 16, device: str = "cpu") -> bytes:
        return identity(Checkpoint.open(where), geometry, size, device)

    before = found()
    assert before == found(Path(shutil.copytree(path, tmp_path / "n", copy_function=shutil.copy2)))
    half = KVGeometry(3, 2, 8, torch.bfloat16)
    others = [found(geometry=half), found(geometry=KVGeometry(3, 4, 4, torch.float32)), found(size=8)]
    others.append(found(device="cuda"))
    shard = sorted(path.glob("*.safetensors"))[0]
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(whole)
    others.append(found())
    config = path / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0') + "\n")
    others.append(found())
    assert len({before, *others}) == 1 + len(others)


def test_with_a_manifest_times_of_change_do_not_count(model_dir: ModelDir, tmp_path: Path) -> None:
    path = Path(shutil.copytree(model_dir("llama"), tmp_path / "m"))
    sampled = identity(Checkpoint.open(path), GEOMETRY, 16, "cpu")
    Manifest.make(Checkpoint.open(path)).write(Checkpoint.open(path))
    digested = identity(Checkpoint.open(path), GEOMETRY, 16, "cpu")
    for shard in path.glob("*.safetensors"):
        os.utime(shard, (1, 1))
    assert identity(Checkpoint.open(path), GEOMETRY, 16, "cpu") == digested != sampled
