import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mball.device import memfd
from mball.device.memfd import Writer
from mball.errors import Cancelled, ReadError
from mball.loader import source, workers
from mball.loader.checkpoint import Checkpoint, Shard, TensorInfo
from mball.loader.lanes import FileLane, HostLane
from mball.loader.plan import Extent, Runs, chunked
from mball.loader.reader import Source, read
from tests.loader.files import open_descriptors

CHUNK = 4096
TENSOR = torch.arange(50_000, dtype=torch.int32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file({"first": TENSOR, "second": TENSOR + 1}, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> object:
    before = len(open_descriptors())
    yield
    assert len(open_descriptors()) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mball-read")]


class Hooked(HostLane):
    """A lane that does something before each buffer it hands out."""

    def __init__(self, base: torch.Tensor, hook: Callable[[], object]) -> None:
        super().__init__(base)
        self._hook = hook

    def buffer(self, extent: Extent) -> memoryview:
        self._hook()
        return super().buffer(extent)


def extents(checkpoint: Checkpoint) -> list[Extent]:
    begin = checkpoint.shards[0].data_start
    return chunked(
        [Extent(0, info.start, info.nbytes, info.start - begin) for info in checkpoint.tensors.values()], CHUNK
    )


@pytest.mark.parametrize("threads", [1, 2, 7, 1000])
def test_every_byte_arrives(checkpoint: Checkpoint, threads: int) -> None:
    base = torch.zeros(checkpoint.nbytes, dtype=torch.uint8)
    calls: list[tuple[int, int]] = []
    count = read(
        extents(checkpoint),
        Source(checkpoint),
        lambda: HostLane(base),
        threads=threads,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert count == checkpoint.nbytes
    assert torch.equal(base.view(torch.int32), torch.cat([TENSOR, TENSOR + 1]))
    assert calls[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert calls == sorted(calls)


def test_nothing_to_read(checkpoint: Checkpoint) -> None:
    assert read([], Source(checkpoint), lambda: HostLane(torch.empty(0, dtype=torch.uint8)), threads=2) == 0


def test_a_file_of_another_size_than_its_header_said(checkpoint: Checkpoint) -> None:
    path = checkpoint.shards[0].path
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ReadError, match=r"model\.safetensors: the file has \d+ bytes, not the \d+"):
        Source(checkpoint)
    path.unlink()
    with pytest.raises(ReadError, match="cannot be opened: No such file"):
        Source(checkpoint)


def test_a_file_that_shrinks_while_it_is_read_names_file_and_tensor(checkpoint: Checkpoint) -> None:
    path = checkpoint.shards[0].path
    base = torch.zeros(checkpoint.nbytes, dtype=torch.uint8)
    middle = checkpoint.tensors["second"].start + 100

    def shrink() -> Hooked:
        return Hooked(base, lambda: os.truncate(path, middle))

    message = rf"model\.safetensors: tensor 'second': ends at byte {middle}.*shrank"
    with pytest.raises(ReadError, match=message) as raised:
        read(extents(checkpoint), Source(checkpoint), shrink, threads=1)
    assert raised.value.tensor == "second"


def test_an_io_error_names_file_and_tensor() -> None:
    # Reading /proc/self/mem at an address that is not mapped is an EIO, with no special disk.
    info = TensorInfo("w", "U8", (4096,), 0, 0, 4096)
    checkpoint = Checkpoint(Path("/proc/self"), (Shard(Path("/proc/self/mem"), 0, 0, 0),), {"w": info}, 4096, 4096)
    base = torch.zeros(4096, dtype=torch.uint8)
    with pytest.raises(ReadError, match="/proc/self/mem: tensor 'w': reading at byte 0 failed: Input/output error"):
        read([Extent(0, 0, 4096, 0)], Source(checkpoint), lambda: HostLane(base), threads=1)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_cancelled_read_ends_within_a_chunk(checkpoint: Checkpoint, threads: int) -> None:
    cancel = threading.Event()
    seen: list[int] = []
    base = torch.zeros(checkpoint.nbytes, dtype=torch.uint8)

    def hook() -> None:
        seen.append(1)
        cancel.set()

    with pytest.raises(Cancelled, match=f"of {checkpoint.nbytes} bytes"):
        read(extents(checkpoint), Source(checkpoint), lambda: Hooked(base, hook), threads=threads, cancel=cancel)
    assert len(seen) <= threads


def test_the_first_error_stops_the_other_threads(checkpoint: Checkpoint) -> None:
    base = torch.zeros(checkpoint.nbytes, dtype=torch.uint8)
    turns = iter(range(10**6))

    def hook() -> None:
        turn = next(turns)
        if turn == 3:
            raise OSError(28, "No space left on device")
        if turn > 3:
            threading.Event().wait(0.05)

    with pytest.raises(OSError, match="No space"):
        read(extents(checkpoint), Source(checkpoint), lambda: Hooked(base, hook), threads=2)
    assert next(turns) < len(extents(checkpoint)) / 2


def test_an_error_in_the_progress_callback_ends_the_read(checkpoint: Checkpoint) -> None:
    base = torch.zeros(checkpoint.nbytes, dtype=torch.uint8)

    def progress(done: int, total: int) -> None:
        raise ValueError("the terminal went away")

    with pytest.raises(ValueError, match="terminal"):
        read(extents(checkpoint), Source(checkpoint), lambda: HostLane(base), threads=2, progress=progress)


def test_a_read_in_which_nothing_arrives_ends(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STALL_S", 0.3)
    base = torch.zeros(checkpoint.nbytes, dtype=torch.uint8)
    go = threading.Event()
    threading.Timer(2.0, go.set).start()
    with pytest.raises(TimeoutError, match="no byte arrived"):
        read(extents(checkpoint), Source(checkpoint), lambda: Hooked(base, go.wait), threads=2)


def test_a_full_image_is_an_error(checkpoint: Checkpoint) -> None:
    full = memfd.create("full", 4096)
    try:
        with pytest.raises(OSError, match="of an image of 4096"):
            read(extents(checkpoint), Source(checkpoint), lambda: FileLane(Writer(full)), threads=2)
    finally:
        os.close(full)


RUNS = Runs(96, 256)


@pytest.mark.parametrize("most_bytes", [10**9, 37, 96, 4096 + 13], ids="at most {} a call".format)
@pytest.mark.parametrize("gap_bytes", [160, 159], ids=["gaps read over", "gaps left out"])
def test_runs_arrive_however_little_a_call_reads(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, most_bytes: int, gap_bytes: int
) -> None:
    calls = 0

    def preadv(fd: int, buffers: list[memoryview], at: int) -> int:
        nonlocal calls
        calls += 1
        content = os.pread(fd, min(most_bytes, sum(map(len, buffers))), at)
        left = content
        for buffer in buffers:
            buffer[: len(left)] = left[: len(buffer)]
            left = left[len(buffer) :]
        return len(content)

    count, shard = 600, checkpoint.shards[0]
    # The last run ends where the file does: nothing behind it is read.
    start = shard.size_bytes - (count - 1) * RUNS.stride_bytes - RUNS.run_bytes
    buffer = bytearray(count * RUNS.run_bytes)
    monkeypatch.setattr(source, "GAP_BYTES", gap_bytes)
    monkeypatch.setattr(source.os, "preadv", preadv)
    opened = Source(checkpoint)
    try:
        opened.read_extent(memoryview(buffer), Extent(0, start, len(buffer), 0, runs=RUNS))
    finally:
        opened.close()
    content = shard.path.read_bytes()
    places = range(start, shard.size_bytes, RUNS.stride_bytes)
    assert bytes(buffer) == b"".join(content[at : at + RUNS.run_bytes] for at in places)
    if most_bytes == 10**9:
        assert calls == (2 if gap_bytes == 160 else count)


def test_a_file_that_ends_between_runs_is_an_error(checkpoint: Checkpoint) -> None:
    opened = Source(checkpoint)
    try:
        os.truncate(checkpoint.shards[0].path, checkpoint.tensors["second"].start + 1000)
        extent = Extent(0, checkpoint.tensors["second"].start, 960, 0, runs=RUNS)
        with pytest.raises(ReadError, match="shrank") as raised:
            opened.read_extent(memoryview(bytearray(960)), extent)
    finally:
        opened.close()
    assert raised.value.tensor == "second"
