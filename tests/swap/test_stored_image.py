"""Weights straight from a store's slots: byte for byte what the shards hold, or a miss."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mball.errors import SwapMiss
from mball.loader import Checkpoint, Piece, Weights, image
from mball.loader.fill import Options
from mball.loader.manifest import Manifest
from mball.loader.paths import EVERY_WAY, Way
from mball.loader.plan import Cast
from mball.swap.book import Want
from mball.swap.disk import aligned
from mball.swap.index import Kind
from mball.swap.place import Place, digest
from mball.swap.store import SwapStore
from mball.swap.stored_image import StoredImage
from mball.units import KiB, MiB
from tests.loader.files import write_sharded
from tests.loader.test_slab import Ledger
from tests.loader.test_transfer import PROFILE, Machine, machine
from tests.loader.test_weights import CPU, Experts, Net, checkpoint, meta, reference, same
from tests.swap.stores import MODEL, SLOT, content, open_at
from tests.swap.stores import image as wanted

__all__ = ["checkpoint", "machine", "reference"]


@contextmanager
def stored(checkpoint: Checkpoint, folder: Path, slot_bytes: int = SLOT) -> Iterator[tuple[SwapStore, Place]]:
    """The checkpoint's image in a store."""
    fd = image.create("m", checkpoint.image_bytes)
    image.fill(checkpoint, fd)
    image.seal(fd)
    key = image.key(checkpoint)
    store = open_at(folder / "store" / "swap", size_bytes=8 * MiB + 2 * checkpoint.image_bytes, slot_bytes=slot_bytes)
    store.put(Want(Kind.IMAGE, key, MODEL, checkpoint.image_bytes), fd)
    os.close(fd)
    try:
        yield store, store.find(key, MODEL)
    finally:
        store.close()


def flip(store: SwapStore, place: Place, at: int) -> None:
    """One bit of the image's byte `at`, on the disk."""
    layout = store.layout
    number = at // layout.slot_bytes
    slot = next(run.slot for run in place.runs(number, 1, 1))
    where = layout.slot_at(slot) + 4 * KiB + at % layout.slot_bytes
    fd = os.open(store.status()["path"], os.O_RDWR)
    byte = os.pread(fd, 1, where)[0]
    os.pwrite(fd, bytes([byte ^ 4]), where)
    os.fsync(fd)
    os.close(fd)


@pytest.mark.parametrize("nbytes", [1, SLOT - 1, SLOT, 5 * SLOT, 9 * SLOT + 4097])
def test_any_bytes_of_it(tmp_path: Path, nbytes: int) -> None:
    store = open_at(tmp_path / "swap")
    want, whole = wanted("a", nbytes), content("a", nbytes)
    store.put(want, whole)
    found = StoredImage(store.slots, store.find(want.key, MODEL))
    chance = random.Random(nbytes)
    for _ in range(200):
        at = chance.randrange(nbytes)
        count = chance.randrange(nbytes - at + 1)
        shift = chance.choice([0, 64, 1])
        memory = aligned(count + shift)[shift:]
        found.read(memory, at)
        assert memory == whole[at : at + count]
    store.close()


def test_a_module_is_filled_from_the_store(checkpoint: Checkpoint, reference: Net, tmp_path: Path) -> None:
    net, ledger = meta(), Ledger(10**6)
    weights = Weights.bind(net, checkpoint, device=CPU, account=ledger)
    with stored(checkpoint, tmp_path) as (store, place):
        for shard in checkpoint.shards:
            shard.path.rename(shard.path.with_suffix(".away"))
        calls: list[tuple[int, int]] = []
        found = StoredImage(store.slots, place)
        stats = weights.load(threads=2, stored=found.read, progress=lambda done, total: calls.append((done, total)))
        assert stats.bytes == checkpoint.nbytes == calls[-1][0]
        assert same(net, reference)
        assert weights.release() == weights.nbytes
        assert ledger.taken_bytes == 0
    weights.close()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("slot_bytes", [4 * KiB, 64 * KiB])
def test_pieces_and_casts(tmp_path: Path, dtype: torch.dtype | None, slot_bytes: int) -> None:
    torch.manual_seed(2)
    parts = {f"{expert}.{half}": torch.randn(4, 5) for expert in range(3) for half in ("gate", "up")}
    folder = write_sharded(tmp_path, {"1.safetensors": parts})
    size = 4 * 5 * (dtype or torch.float32).itemsize
    pieces = [Piece(name, number * size) for number, name in enumerate(parts)]
    with torch.device("meta"):
        net = Experts()
    weights = Weights.bind(net, Checkpoint.open(folder), device=CPU, dtype=dtype, sources={"gate_up": pieces})
    with stored(Checkpoint.open(folder), tmp_path, slot_bytes) as (store, place):
        weights.load(stored=StoredImage(store.slots, place).read)
    fused = torch.stack([torch.cat([parts[f"{expert}.gate"], parts[f"{expert}.up"]]) for expert in range(3)])
    assert torch.equal(net.gate_up, fused.to(dtype or torch.float32))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_flipped_byte_is_a_miss_and_nothing_is_held(
    checkpoint: Checkpoint, reference: Net, tmp_path: Path, share: float
) -> None:
    net, ledger = meta(), Ledger(10**6)
    weights = Weights.bind(net, checkpoint, device=CPU, account=ledger)
    with stored(checkpoint, tmp_path) as (store, place):
        flip(store, place, int(share * (checkpoint.image_bytes - 1)))
        with pytest.raises(SwapMiss) as miss:
            weights.load(stored=StoredImage(store.slots, place).read)
        assert miss.value.reason == "checksum"
        assert ledger.taken_bytes == 0
    weights.load()
    assert same(net, reference)
    weights.close()


@pytest.mark.parametrize("ways", [EVERY_WAY, {Way.RING}, {Way.DIRECT}, {Way.MAPPED}, {Way.BUFFERED}])
@pytest.mark.parametrize("slot_bytes", [4 * KiB, 64 * KiB])
def test_to_a_gpu_it_goes_through_the_ring(machine: Machine, tmp_path: Path, ways: set[Way], slot_bytes: int) -> None:
    with stored(machine.checkpoint, tmp_path, slot_bytes) as (store, place):
        found = StoredImage(store.slots, place)
        filled, memory = machine.fill(Options(ways=ways, stored=found.read))
    machine.check(memory)
    assert machine.asked["cold"]
    assert filled.nbytes == machine.checkpoint.nbytes
    assert set(filled.by_way) <= {"ring", "buffered"}


def test_to_a_gpu_with_casts_and_checked_against_a_manifest(machine: Machine, tmp_path: Path) -> None:
    manifest = Manifest.make(machine.checkpoint)
    cast = Cast(torch.uint8, torch.int32)
    extents = []
    at = 0
    for extent in machine.extents():
        extents.append(type(extent)(extent.shard, extent.start, extent.nbytes, at, cast))
        at += 4 * (-(-extent.nbytes // 64) * 64)
    del extents[3:]
    with stored(machine.checkpoint, tmp_path) as (store, place):
        found = StoredImage(store.slots, place)
        _, memory = machine.fill(Options(stored=found.read), extents=extents)
        for extent, name in zip(extents, machine.checkpoint.tensors, strict=False):
            assert torch.equal(_ints(memory, extent.offset, extent.nbytes), machine.tensors[name].int())
        _, memory = machine.fill(Options(stored=found.read, verify=manifest))
        machine.check(memory)


def test_a_miss_on_the_way_to_a_gpu_leaves_nothing_under_way(machine: Machine, tmp_path: Path) -> None:
    machine.profile = PROFILE
    with stored(machine.checkpoint, tmp_path) as (store, place):
        flip(store, place, machine.checkpoint.image_bytes // 2)
        with pytest.raises(SwapMiss):
            machine.fill(Options(stored=StoredImage(store.slots, place).read))


def test_the_key_names_the_content(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = image.key(checkpoint)
    assert image.key(checkpoint) == first
    os.utime(checkpoint.shards[0].path, ns=(1, 1))
    second = image.key(checkpoint)
    assert second != first
    data = bytearray(checkpoint.shards[1].path.read_bytes())
    status = checkpoint.shards[1].path.stat()
    header = data.index(b"F32")
    data[header : header + 3] = b"I32"
    checkpoint.shards[1].path.write_bytes(data)
    os.utime(checkpoint.shards[1].path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert image.key(checkpoint) != second
    assert digest("x") != first


def _ints(memory: Tensor, offset: int, count: int) -> Tensor:
    return memory[offset : offset + 4 * count].view(torch.int32)
