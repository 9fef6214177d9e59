from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from mball.errors import SwapMiss
from mball.swap import place
from mball.swap.checksum import KNOWN, OURS, SHA256, XXH3, checksum
from mball.swap.disk import aligned
from mball.swap.place import kind_of
from mball.swap.slots import Slots
from tests.swap.stores import block, content, open_at

_WITHOUT_XXHASH = """
import sys
sys.modules["xxhash"] = None
from mball.swap.checksum import KNOWN, OURS, SHA256
import mball.swap.slots
assert OURS == SHA256 and KNOWN == (SHA256,), (OURS, KNOWN)
"""


def test_what_there_is() -> None:
    assert checksum(XXH3, b"ab", memoryview(b"c")) == xxhash.xxh3_128_digest(b"abc")
    assert checksum(SHA256, b"ab", memoryview(b"c")).hex() == "ba7816bf8f01cfea414140de5dae2223"
    assert OURS == XXH3
    assert set(KNOWN) == {XXH3, SHA256}


def test_an_interpreter_without_xxhash_reads_and_writes_slots() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_XXHASH], check=True)


def test_a_slot_that_such_a_process_wrote_is_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, want = open_at(tmp_path / "store"), block("a")
    lease = store.lease("w", want)
    assert lease is not None
    with monkeypatch.context() as patch:
        patch.setattr(place, "OURS", SHA256)
        store.slots.write(lease.place, content("a", want.nbytes))
    assert store.commit("w", [lease.id]) == 1
    memory = aligned(want.nbytes)
    store.slots.read(lease.place, memory)
    assert memory == content("a", want.nbytes)

    at = store.layout.slot_at(lease.place.extents[0].first)
    damage(store.slots, at + 4096)
    with pytest.raises(SwapMiss, match="does not hold") as miss:
        store.slots.read(lease.place, memory)
    assert miss.value.reason == "checksum"
    store.close()


@pytest.mark.parametrize("kind", [XXH3, SHA256, 77])
def test_a_reader_that_proves_the_payload_itself_needs_no_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    store, want = open_at(tmp_path / "store"), block("a")
    lease = store.lease("w", want)
    assert lease is not None
    with monkeypatch.context() as patch:
        patch.setattr(place, "OURS", kind)
        patch.setattr(place, "checksum", lambda *_: bytes(16))
        store.slots.write(lease.place, content("a", want.nbytes))
    damage(store.slots, store.layout.slot_at(lease.place.extents[0].first) + 4096)
    memory, bare = aligned(want.nbytes), aligned(lease.place.slots * store.layout.stride_bytes)
    store.slots.read_bare(lease.place, 0, bare)
    strides = [bare[at:][4096 : store.layout.stride_bytes] for at in range(0, len(bare), store.layout.stride_bytes)]
    payload = b"".join(strides)[: want.nbytes]
    assert sum(one != other for one, other in zip(payload, content("a", want.nbytes), strict=True)) == 1
    with pytest.raises(SwapMiss, match="does not hold"):
        store.slots.read(lease.place, memory)

    for other in ({"key": b"k" * 32}, {"model": b"m" * 32}, {"generation": lease.place.generation + 1}):
        with pytest.raises(SwapMiss, match="does not hold") as miss:
            store.slots.read_bare(replace(lease.place, **other), 0, bare)
        assert miss.value.reason == "stale"
    damage(store.slots, store.layout.slot_at(lease.place.extents[0].first))
    with pytest.raises(SwapMiss, match="does not hold"):
        store.slots.read_bare(lease.place, 0, bare)
    store.close()


def damage(slots: Slots, at: int) -> None:
    page = aligned(4096)
    slots.disk.read([page], at)
    page[17] ^= 1
    slots.disk.write([page], at)


def test_what_can_not_be_checked_is_taken_for_another_write() -> None:
    assert kind_of(b"MBALSLOT" + (77).to_bytes(4, "little")) == OURS
