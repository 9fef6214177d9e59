"""What is done to a store while it fails. `python -m tests.swap.scenario FOLDER`: once for every change that it makes
to its file, in a process that is killed at that change; the stores stay in FOLDER, the number of changes is printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from mball.errors import SwapError, SwapMiss
from mball.swap.book import Want
from mball.swap.check import check
from mball.swap.disk import Disk, reopened
from mball.swap.store import SwapStore, open_store
from mball.units import KiB
from tests.swap.stores import SLOT, block, content, counting, get, image, killing_at, settings

SMALL = 420 * KiB

WANTS: dict[str, Want] = {
    "A": image("A", 6 * SLOT - 100, saved_s=300.0),
    "B": image("B", 9 * SLOT, saved_s=900.0),
    "C": image("C", 7 * SLOT + 1, saved_s=5000.0),
    **{f"b{n}": block(f"b{n}", parent=f"b{n - 1}" if n else None, saved_s=10.0 + n) for n in range(14)},
}


def expected(name: str) -> memoryview:
    return content(name, WANTS[name].nbytes)


def run(
    path: Path, open_disk: Callable[..., Disk] = reopened, durable: Callable[[str], object] = lambda said: None
) -> None:
    """`durable` is told `NAME` once it must survive anything, and `-NAME` when that ends. Refusals are no errors."""

    def put(store: SwapStore, *names: str) -> None:
        for name in names:
            try:
                if store.put(WANTS[name], expected(name)) and name.isupper():
                    durable(name)
            except SwapError:
                continue

    def opened() -> SwapStore:
        return open_store(settings(path, size_bytes=SMALL), open_disk=open_disk)

    store = opened()
    put(store, "A", *(f"b{n}" for n in range(6)))
    durable("-A")
    store.drop(WANTS["A"].key)
    put(store, "B", *(f"b{n}" for n in range(6, 14)), "A")
    readable(store)
    store.close()
    store = opened()
    durable("-A")
    durable("-B")
    put(store, "C", "A")
    readable(store)
    store.close()


def readable(store: SwapStore) -> set[str]:
    """The names of all that is there; each is as it was written."""
    found = set()
    for name, want in WANTS.items():
        try:
            if get(store, want) != expected(name):
                raise RuntimeError(f"{name} is not what was written")
            found.add(name)
        except SwapMiss as miss:
            if miss.reason != "absent":
                raise RuntimeError(f"{name} is named, but damaged: {miss}") from miss
    return found


def survived(path: Path, durable: set[str]) -> set[str]:
    """Opened again: old or new, no mix, nothing lost that must be there, and it takes writes."""
    if path.exists() and path.stat().st_size > SMALL // 2:
        try:
            found = check(path)
        except SwapError:
            pass
        else:
            if found.bad:
                raise RuntimeError(f"damaged: {found.bad}")
    store = open_store(settings(path, size_bytes=SMALL))
    there = readable(store)
    if not durable <= there:
        raise RuntimeError(f"lost: {durable - there}")
    store.put(WANTS["C"], expected("C"))
    if get(store, WANTS["C"]) != expected("C"):
        raise RuntimeError("not written again")
    store.close()
    return there


def _in_a_child(path: Path, number: int) -> bool:
    """Whether it came to its end; what had to survive is noted beside the store."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    notes = os.open(f"{path}.notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        run(path, counting(killing_at(number)), lambda said: os.write(notes, f"{said}\n".encode()))
    except BaseException:  # noqa: BLE001
        os._exit(1)
    os._exit(0)


def noted(path: Path) -> set[str]:
    notes = Path(f"{path}.notes")
    found: set[str] = set()
    for line in notes.read_text().split() if notes.exists() else []:
        found = found - {line[1:]} if line.startswith("-") else found | {line}
    return found


if __name__ == "__main__":
    number = 1
    while not _in_a_child(Path(sys.argv[1]) / str(number), number):
        number += 1
    sys.stdout.write(f"{number - 1}\n")
