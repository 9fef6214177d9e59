from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mball.errors import ConfigError, SwapForeign, SwapInUse, SwapMiss, SwapUnavailable
from mball.swap import opening
from mball.swap.check import check, look
from mball.swap.disk import Disk, aligned, reopened
from mball.swap.layout import BLOCK_BYTES
from mball.swap.store import open_store
from mball.units import KiB, MiB
from tests.small_disk import SMALL, freeze
from tests.swap.stores import MODEL, SIZE, SLOT, content, get, image, open_at, settings

ROOT = Path(__file__).parents[2]
WANT = image("a", 5 * SLOT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "swap"


def filled(path: Path) -> None:
    store = open_at(path)
    store.put(WANT, content("a", WANT.nbytes))
    store.close()


def test_the_file_is_its_owners_alone_and_takes_its_space_at_once(path: Path) -> None:
    store = open_at(path)
    status = path.stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == store.layout.total_bytes <= SIZE
    assert status.st_blocks * 512 >= status.st_size
    store.close()
    path.chmod(0o644)
    open_at(path).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_copy_with_holes_is_filled_up(path: Path) -> None:
    filled(path)
    holes = path.with_name("holes")
    subprocess.run(["cp", "--sparse=always", path, holes], check=True)
    store = open_at(holes)
    assert holes.stat().st_blocks * 512 >= store.layout.total_bytes
    assert get(store, WANT) == content("a", WANT.nbytes)
    store.close()


@pytest.mark.parametrize("data", [b"x", b"hello" * 5000, bytes(3 * MiB), b"\0" * 5000 + b"data"])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_not_ours_is_never_written_to(path: Path, data: bytes, fresh: bool) -> None:
    path.write_bytes(data)
    path.chmod(0o640)
    with pytest.raises(SwapForeign, match=r"not MBALL's, and is left as it is.*rm "):
        opening.acquire(path, size_bytes=SIZE, slot_bytes=SLOT, fresh=fresh)
    with pytest.raises(SwapForeign):
        look(path)
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_empty_file_may_be_used(path: Path) -> None:
    path.touch()
    filled(path)
    assert check(path).whole


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_no_file_at_all(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    with pytest.raises((SwapForeign, SwapUnavailable)):
        open_at(path)


def test_another_size_is_made_anew(path: Path) -> None:
    filled(path)
    store = open_at(path, size_bytes=SIZE + MiB)
    assert store.counters["remade"] == 1
    assert not store.has(WANT.key, MODEL)
    assert path.stat().st_size == store.layout.total_bytes > SIZE
    store.close()
    store = open_at(path, size_bytes=SIZE)
    assert path.stat().st_size == store.layout.total_bytes <= SIZE
    store.close()


@pytest.mark.parametrize(
    ("at", "byte"),
    [(8, 99), (16, 1), (24, 3), (50, 1)],
    ids=["version", "slot bytes", "slots", "layout digest"],
)
def test_another_version_or_layout_is_made_anew(path: Path, at: int, byte: int) -> None:
    filled(path)
    with path.open("r+b") as file:
        for copy in range(2):
            file.seek(copy * BLOCK_BYTES + at)
            file.write(bytes([byte]))
    with pytest.raises(SwapUnavailable, match="is MBALL's, but can't be used"):
        look(path)
    store = open_at(path)
    assert store.counters["remade"] == 1
    with pytest.raises(SwapMiss):
        get(store, WANT)
    store.close()


def test_one_good_superblock_is_enough(path: Path) -> None:
    filled(path)
    with path.open("r+b") as file:
        file.write(bytes(BLOCK_BYTES))
    store = open_at(path)
    assert get(store, WANT) == content("a", WANT.nbytes)
    store.close()


@pytest.mark.parametrize("left", [1, 100, 5000, 9000, SIZE // 2])
def test_a_short_file_is_made_anew(path: Path, left: int) -> None:
    filled(path)
    os.truncate(path, left)
    if left < 100:
        with pytest.raises(SwapForeign):
            open_at(path)
        return
    store = open_at(path)
    assert store.counters["remade"] == 1
    assert not store.has(WANT.key, MODEL)
    store.close()


def test_a_second_manager_is_refused_and_told_who_has_it(path: Path) -> None:
    store = open_at(path)
    with pytest.raises(SwapInUse, match=f"pid {os.getpid()}: .*stop it, or name another path"):
        open_at(path)
    with pytest.raises(SwapInUse, match="stop it first"):
        check(path)
    assert f"pid {os.getpid()}" in (look(path).held_by or "")
    store.close()
    assert look(path).held_by is None
    open_at(path).close()


def test_a_workers_descriptor_keeps_no_lock(path: Path) -> None:
    """A manager that was killed leaves the store to the next one, whatever its workers still do."""
    code = (
        "import os, sys, subprocess\nfrom pathlib import Path\nfrom tests.swap.stores import open_at\n"
        "store = open_at(Path(sys.argv[1]))\n"
        "fd = store.worker_fd()\n"
        "worker = subprocess.Popen(['sleep', '60'], pass_fds=[fd], stdout=subprocess.DEVNULL)\n"
        "print(worker.pid, flush=True)\nsys.stdin.read()\n"
    )
    manager = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert manager.stdout is not None
    assert manager.stdin is not None
    with manager.stdout, manager.stdin:
        worker = int(manager.stdout.readline())
        try:
            with pytest.raises(SwapInUse):
                open_at(path)
            manager.kill()
            manager.wait(30)
            open_at(path).close()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_without_a_size_it_must_be_there(path: Path) -> None:
    with pytest.raises(SwapUnavailable, match="make it with"):
        open_at(path, size_bytes=None)
    assert not path.exists()
    filled(path)
    store = open_at(path, size_bytes=None)
    assert get(store, WANT) == content("a", WANT.nbytes)
    store.close()


def test_a_size_that_holds_nothing(path: Path) -> None:
    with pytest.raises(ConfigError, match="no room"):
        open_at(path, size_bytes=16 * KiB)
    assert not path.exists()


def test_where_direct_reads_are_refused_it_goes_through_the_page_cache(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuses(fd: int, *, writable: bool = True) -> Disk:
        return Disk(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), direct=False)

    store = open_store(settings(path), open_disk=refuses)
    assert capfd.readouterr().out.count("refuses O_DIRECT") == 1
    odd = memoryview(bytearray(WANT.nbytes + 1))[1:]
    odd[:] = content("a", WANT.nbytes)
    store.put(WANT, odd)
    assert get(store, WANT) == content("a", WANT.nbytes)
    store.close()
    store = open_at(path)
    assert get(store, WANT) == content("a", WANT.nbytes), "both ways have one format"
    store.close()


def test_a_file_system_that_takes_the_flag_and_refuses_the_read(path: Path) -> None:
    """As some FUSE file systems do; /proc does the like."""
    fd = os.open("/proc/self/status", os.O_RDONLY)
    disk = reopened(fd, writable=False)
    assert not disk.direct
    disk.close()
    os.close(fd)


def test_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "swap"
    with pytest.raises(SwapUnavailable, match=r"wanted on the disk, 64.0 MiB free"):
        open_at(path, size_bytes=100 * MiB)
    assert list(small_disk.iterdir()) == [], "nothing is left of it"
    store = open_at(path, size_bytes=60 * MiB)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "others").write_bytes(bytes(SMALL))
    # Its space was taken before: the disk being full is nothing to it.
    store.put(WANT, content("a", WANT.nbytes))
    assert get(store, WANT) == content("a", WANT.nbytes)
    store.close()


def test_a_read_only_file_system_is_read_from(small_disk: Path) -> None:
    filled(small_disk / "swap")
    freeze(small_disk)
    store = open_at(small_disk / "swap")
    assert store.read_only
    assert get(store, WANT) == content("a", WANT.nbytes)
    store.close()
    with pytest.raises(SwapUnavailable, match="Read-only file system"):
        open_at(small_disk / "another")
    assert check(small_disk / "swap").whole


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("losetup") is None, reason="a loop device needs root")
def test_a_block_device(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(8 * MiB))
    done = subprocess.run(["losetup", "--show", "-f", str(backing)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        filled(device)
        store = open_at(device)
        assert get(store, WANT) == content("a", WANT.nbytes)
        with pytest.raises(SwapInUse):
            open_at(device)
        store.close()
        with device.open("r+b") as file:
            file.write(bytes(2 * BLOCK_BYTES))
        with pytest.raises(SwapForeign, match="blkdiscard"):
            open_at(device)
    finally:
        subprocess.run(["losetup", "-d", str(device)], check=True)


def test_a_limit_on_file_sizes_is_a_full_disk(path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom tests.swap.stores import open_at\n"
        "from mball.errors import SwapUnavailable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n    open_at(Path(sys.argv[1]))\nexcept SwapUnavailable as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "File too large: give it less, or another disk" in done.stdout
    assert not path.exists()


def test_a_read_error_is_a_miss_and_its_slots_are_left_alone(path: Path) -> None:
    class Bad(Disk):
        broken = -1

        def preadv(self, parts: list[memoryview], at: int) -> int:  # type: ignore[override]
            if at == self.broken:
                raise OSError(errno.EIO, "planted")
            return super().preadv(parts, at)

    def opens(fd: int, *, writable: bool = True) -> Disk:
        return Bad(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT), direct=True)

    store = open_store(settings(path), open_disk=opens)
    store.put(WANT, content("a", WANT.nbytes))
    place = store.find(WANT.key, MODEL)
    store.slots.disk.broken = store.layout.slot_at(place.extents[0].first)  # type: ignore[attr-defined]
    with pytest.raises(SwapMiss, match="io"):
        store.get(WANT.key, MODEL, aligned(WANT.nbytes))
    assert store.counters["misses:io"] == 1
    assert store.status()["retired_slots"] == 5
    assert store.read_only is None
    store.close()
