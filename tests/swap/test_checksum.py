from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from mball.errors import SwapMiss
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


def test_a_slot_that_such_a_process_wrote_is_read_and_checked(tmp_path: Path) -> None:
    store, want = open_at(tmp_path / "store"), block("a")
    lease = store.lease("w", want)
    assert lease is not None
    for run in store.slots.runs(lease.place):
        store.slots.write_run(lease.place, run, content("a", want.nbytes), kind=SHA256)
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


def damage(slots: Slots, at: int) -> None:
    page = aligned(4096)
    slots.disk.read([page], at)
    page[17] ^= 1
    slots.disk.write([page], at)


def test_what_can_not_be_checked_is_taken_for_another_write() -> None:
    assert kind_of(b"MBALSLOT" + (77).to_bytes(4, "little")) == OURS
