"""One way to write and read a file in slots, in a process of its own: `python -m mball.bench.swap_contenders SPEC`; it
speaks as mball.bench.contenders does."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from mball.bench.contenders import Cannot, in_turn
from mball.swap.book import Lease, Want
from mball.swap.disk import aligned
from mball.swap.index import Kind
from mball.swap.place import digest
from mball.swap.store import Settings, SwapStore, open_store
from mball.units import MiB

IMAGE = "mball, one image"
BLOCKS = "mball, blocks of one slot"
_RAW = "raw O_DIRECT, depth "

_PATTERN_BYTES = 64 * MiB
_OWNER = "bench"
_MODEL = digest("bench")


@dataclass(frozen=True, slots=True)
class Spec:
    """`path` is a store's file, or for the raw ones a file of `nbytes`; both were written to before."""

    contender: str
    path: str
    nbytes: int
    slot_bytes: int
    threads: int

    def command(self) -> list[str]:
        return [sys.executable, "-m", "mball.bench.swap_contenders", json.dumps(asdict(self))]


def raw(depth: int) -> str:
    return f"{_RAW}{depth}"


def is_raw(name: str) -> bool:
    return name.startswith(_RAW)


def pattern(nbytes: int) -> memoryview:
    """Page-aligned memory that no disk finds equal or empty, all of it touched."""
    memory = aligned(nbytes)
    part = secrets.token_bytes(min(_PATTERN_BYTES, nbytes))
    for at in range(0, nbytes, len(part)):
        memory[at : at + len(part)] = part[: nbytes - at]
    return memory


def _raw_turn(spec: Spec, source: memoryview, target: memoryview) -> dict[str, Any]:
    """As many calls of one slot each in flight as the depth says; written is what is synced."""
    depth = int(spec.contender.removeprefix(_RAW))
    try:
        fd = os.open(spec.path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        raise Cannot(f"its file system refuses it: {error.strerror}") from error
    places = range(0, spec.nbytes, spec.slot_bytes)

    def write(at: int) -> int:
        return os.pwritev(fd, [source[at : at + spec.slot_bytes]], at)

    def read(at: int) -> int:
        return os.preadv(fd, [target[at : at + spec.slot_bytes]], at)

    def write_all(pool: ThreadPoolExecutor) -> None:
        _check_whole(spec, pool.map(write, places))
        os.fdatasync(fd)

    try:
        with ThreadPoolExecutor(depth) as pool:
            write_s = _timed(lambda: write_all(pool))
            read_s = _timed(lambda: _check_whole(spec, pool.map(read, places)))
    finally:
        os.close(fd)
    return {"write_s": write_s, "read_s": read_s}


def _image_turn(spec: Spec, source: memoryview, target: memoryview) -> dict[str, Any]:
    """One entry, by the manager's own threads; written is what the index on the disk names."""
    store = _emptied(spec)
    want = Want(Kind.IMAGE, digest("image"), _MODEL, spec.nbytes)
    write_s = _timed(lambda: store.put(want, source))
    read_s = _timed(lambda: store.get(want.key, _MODEL, target))
    store.close()
    return {"write_s": write_s, "read_s": read_s}


def _blocks_turn(spec: Spec, source: memoryview, target: memoryview) -> dict[str, Any]:
    """Entries of one slot each, as a worker does it: leased, written, committed, found, read."""
    store = _emptied(spec)
    numbers = range(spec.nbytes // spec.slot_bytes)
    wants = [Want(Kind.BLOCK, digest("block", str(n)), _MODEL, spec.slot_bytes) for n in numbers]

    def part(memory: memoryview, number: int) -> memoryview:
        return memory[number * spec.slot_bytes : (number + 1) * spec.slot_bytes]

    def write(number: int) -> Lease:
        lease = store.lease(_OWNER, wants[number])
        if lease is None:
            raise Cannot("the store was not empty")
        store.slots.write(lease.place, part(source, number))
        return lease

    def read(number: int) -> int:
        return store.slots.read(store.find(wants[number].key, _MODEL), part(target, number))

    def write_all(pool: ThreadPoolExecutor) -> None:
        store.commit(_OWNER, [lease.id for lease in pool.map(write, numbers)])
        store.flush()

    with ThreadPoolExecutor(spec.threads) as pool:
        write_s = _timed(lambda: write_all(pool))
        read_s = _timed(lambda: list(pool.map(read, numbers)))
    store.close()
    return {"write_s": write_s, "read_s": read_s}


def _emptied(spec: Spec) -> SwapStore:
    store = open_store(Settings(Path(spec.path), threads=spec.threads))
    store.drop(digest("image"))
    for number in range(spec.nbytes // spec.slot_bytes):
        store.drop(digest("block", str(number)))
    if not store.flush():
        raise Cannot(f"the store takes no writes: {store.read_only}")
    return store


def _check_whole(spec: Spec, counts: Iterable[int]) -> None:
    done = sum(counts)
    if done != spec.nbytes:
        raise Cannot(f"{done} of {spec.nbytes} bytes")


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _turn(spec: Spec, source: memoryview, target: memoryview) -> dict[str, Any]:
    turns = {IMAGE: _image_turn, BLOCKS: _blocks_turn}
    measures = turns.get(spec.contender, _raw_turn)(spec, source, target)
    # What was read is what was written: for the raw ones as well, or they would have skipped something.
    if xxhash.xxh3_128_digest(source) != xxhash.xxh3_128_digest(target):
        raise Cannot("what it read is not what it wrote")
    return {"bytes": spec.nbytes, **measures}


def main(argument: str) -> dict[str, Any]:
    spec = Spec(**json.loads(argument))
    source, target = pattern(spec.nbytes), aligned(spec.nbytes)
    # Every page is there before the clock.
    target[:] = source
    target[: spec.slot_bytes] = bytes(spec.slot_bytes)
    return in_turn(lambda _: _turn(spec, source, target))


def names(depths: Sequence[int]) -> list[str]:
    return [IMAGE, BLOCKS, *map(raw, depths)]


if __name__ == "__main__":
    # This file as a module, too: its exceptions must be those that the other modules raise.
    from mball.bench import swap_contenders

    sys.stdout.write(json.dumps(swap_contenders.main(sys.argv[1])) + "\n")
    sys.stdout.flush()
    os._exit(0)
