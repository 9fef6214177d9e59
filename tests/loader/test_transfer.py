"""Every way to a GPU, on a runtime that copies late and refuses what a driver would."""

import os
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mball.device.memfd import Writer
from mball.errors import Cancelled, DigestMismatch, ReadError
from mball.loader import fill as filling
from mball.loader import image, transfer
from mball.loader.checkpoint import Checkpoint
from mball.loader.fill import Filled, Options, through
from mball.loader.manifest import Manifest
from mball.loader.paths import EVERY_WAY, Way
from mball.loader.plan import Cast, Extent
from mball.loader.registered import Images
from mball.loader.ring import RingPool
from mball.loader.slab import HostSlab
from mball.loader.source import Source
from mball.loader.tuning import Profile
from mball.units import KiB, MiB
from tests.device.fake_cuda import FakeRuntime
from tests.loader.files import open_descriptors, write_sharded

PROFILE = Profile(cores=16, threads=4, buffer_bytes=64 * KiB, buffers=8, window_bytes=256 * KiB)
FEW = replace(PROFILE, cores=2, threads=2, buffers=4)


class Machine:
    """A checkpoint, a fake GPU, and this test's own pools."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        sizes = (300_001, 64, 7, 150_000, 1, 99_999, 200_000)
        bytes_of = {
            f"t{number}": torch.randint(0, 256, (size,), dtype=torch.uint8) for number, size in enumerate(sizes)
        }
        names = list(bytes_of)
        self.tensors = bytes_of
        self.checkpoint = Checkpoint.open(
            write_sharded(
                folder,
                {
                    "1.safetensors": {name: bytes_of[name] for name in names[:4]},
                    "2.safetensors": {name: bytes_of[name] for name in names[4:]},
                },
            )
        )
        self.runtime = FakeRuntime()
        self.rings = RingPool()
        self.images = Images()
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(transfer, "RINGS", self.rings)
        monkeypatch.setattr(transfer, "IMAGES", self.images)
        monkeypatch.setattr(transfer, "PIECE_BYTES", 256 * KiB)
        monkeypatch.setattr("mball.loader.registered.PIECE_BYTES", 256 * KiB)
        self.profile = PROFILE

    def extents(self) -> list[Extent]:
        at, extents = 0, []
        for info in self.checkpoint.tensors.values():
            extents.append(Extent(info.shard, info.start, info.nbytes, at))
            at += -(-info.nbytes // 64) * 64
        return extents

    def fill(
        self, options: Options | None = None, image_fd: int | None = None, extents: list[Extent] | None = None
    ) -> tuple[Filled, Tensor]:
        self._monkeypatch.setattr(filling, "profile", self._profile)
        extents = self.extents() if extents is None else extents
        slab = HostSlab(2 * self.checkpoint.nbytes + 4096)
        slab.memory().fill_(171)
        source = Source(self.checkpoint, image_fd, (options or Options()).stored)
        options = options or Options()
        into = options.fill_image_fd
        with nullcontext() if into is None else closing(Writer(into)) as writer:
            filled = through(self.runtime, extents, self.checkpoint, slab, options, source, writer)
        return filled, slab.memory()

    def _profile(self, threads: int | None, **how: object) -> Profile:
        self.asked = how
        return self.profile

    def check(self, memory: Tensor) -> None:
        for extent, tensor in zip(
            self.extents(), (self.tensors[name] for name in self.checkpoint.tensors), strict=True
        ):
            assert torch.equal(memory[extent.offset : extent.offset + extent.nbytes], tensor)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    before = open_descriptors()
    machine = Machine(tmp_path, monkeypatch)
    yield machine
    assert open_descriptors() == before
    assert all(not stream.pending for stream in machine.runtime.streams)
    machine.rings.release()
    assert machine.runtime.registered == {}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mball-read")]


@pytest.mark.parametrize("profile", [PROFILE, FEW, replace(PROFILE, threads=1, buffers=2)])
@pytest.mark.parametrize("ways", [*[{way} for way in Way], EVERY_WAY])
def test_every_way_alone_is_bit_for_bit(machine: Machine, ways: set[Way], profile: Profile) -> None:
    machine.profile = profile
    for _ in range(3):
        filled, memory = machine.fill(Options(ways=ways))
        machine.check(memory)
        assert filled.nbytes == machine.checkpoint.nbytes == sum(filled.by_way.values())
        if len(ways) == 1:
            assert filled.by_way == {next(iter(ways)).value: filled.nbytes}
    assert machine.runtime.pageable_copies == 0


def test_few_cores_go_by_the_mapping_and_many_by_the_ring(machine: Machine) -> None:
    assert machine.fill()[0].by_way.keys() == {"ring"}
    machine.profile = FEW
    assert machine.fill()[0].by_way.keys() == {"mapped"}
    assert {read_only for _, _, read_only in machine.runtime.registrations} == {False, True}


def test_cold_files_go_past_the_page_cache(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "resident_share", lambda source, shard, start, nbytes: 0.0 if shard else 1.0)
    first = sum(info.nbytes for info in machine.checkpoint.tensors.values() if info.shard == 0)
    filled, memory = machine.fill()
    machine.check(memory)
    assert filled.by_way == {"ring": first, "direct": machine.checkpoint.nbytes - first}


def test_a_file_system_without_direct_reads(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "read_direct", lambda *arguments: None)
    monkeypatch.setattr(Source, "resident_share", lambda *arguments: 0.0)
    filled, memory = machine.fill()
    machine.check(memory)
    assert filled.by_way == {"ring": machine.checkpoint.nbytes}


def test_the_ring_is_pinned_once_and_bounded(machine: Machine) -> None:
    for _ in range(4):
        machine.check(machine.fill()[1])
    assert len(machine.runtime.registrations) <= PROFILE.buffers
    assert machine.runtime.most_registered_bytes <= PROFILE.buffers * PROFILE.buffer_bytes
    assert machine.rings.idle_bytes == PROFILE.buffers * PROFILE.buffer_bytes
    assert machine.rings.release() == PROFILE.buffers * PROFILE.buffer_bytes
    assert machine.runtime.registered == {}


def test_a_mapping_holds_only_its_windows(machine: Machine) -> None:
    machine.profile = FEW
    machine.fill(Options(ways={Way.MAPPED}))
    assert machine.runtime.registered == {}
    assert machine.runtime.most_registered_bytes <= FEW.threads * (FEW.depth + 1) * (FEW.window_bytes + 8192)


@pytest.mark.parametrize("profile", [PROFILE, FEW])
def test_a_driver_that_refuses_costs_speed_alone(
    machine: Machine, profile: Profile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mball.loader.ring._warned", set())
    machine.profile = profile
    machine.runtime = FakeRuntime(refuses=lambda nbytes, read_only: True)
    for _ in range(2):
        filled, memory = machine.fill()
        machine.check(memory)
        assert filled.by_way == {"ring": filled.nbytes}
    assert machine.runtime.pageable_copies > 0
    messages = [record.message for record in caplog.records]
    assert len(messages) == len(set(messages)) == (1 if profile is PROFILE else 2)
    assert "pageable memory" in messages[-1]


def test_a_limit_on_pinned_memory_leaves_a_smaller_ring(machine: Machine) -> None:
    left = [3]

    def refuses(nbytes: int, read_only: bool) -> bool:
        left[0] -= 1
        return left[0] < 0

    machine.runtime = FakeRuntime(refuses=refuses)
    machine.check(machine.fill()[1])
    assert len(machine.runtime.registered) == 3


@pytest.fixture
def image_fd(machine: Machine) -> Iterator[int]:
    fd = image.create("test", machine.checkpoint.image_bytes)
    image.fill(machine.checkpoint, fd)
    image.seal(fd)
    yield fd
    os.close(fd)


def test_an_image_is_registered_once_and_until_it_is_detached(machine: Machine, image_fd: int) -> None:
    for shard in machine.checkpoint.shards:
        shard.path.unlink()
    for _ in range(3):
        again = os.dup(image_fd)
        filled, memory = machine.fill(image_fd=again)
        os.close(again)
        machine.check(memory)
        assert filled.by_way == {"mapped": filled.nbytes}
    assert sum(nbytes for _, nbytes, _ in machine.runtime.registrations) == machine.checkpoint.image_bytes
    assert all(read_only for _, _, read_only in machine.runtime.registrations)
    machine.images.detach(image_fd)
    assert machine.runtime.registered == {}
    machine.images.detach(image_fd)


def test_an_image_that_cannot_be_registered_goes_through_the_ring(machine: Machine, image_fd: int) -> None:
    machine.runtime = FakeRuntime(refuses=lambda nbytes, read_only: read_only)
    for _ in range(2):
        filled, memory = machine.fill(image_fd=image_fd)
        machine.check(memory)
        assert filled.by_way == {"ring": filled.nbytes}
    machine.images.detach(image_fd)


@pytest.mark.parametrize("from_image", [False, True])
@pytest.mark.parametrize("profile", [PROFILE, FEW])
def test_casts(machine: Machine, profile: Profile, from_image: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    wide = torch.randn(70_000)
    (tmp_path / "wide").mkdir()
    machine.checkpoint = Checkpoint.open(write_sharded(tmp_path / "wide", {"w.safetensors": {"w": wide}}))
    machine.profile = profile
    info = machine.checkpoint.tensors["w"]
    extents = [Extent(0, info.start, info.nbytes, 64, Cast(torch.float32, torch.bfloat16))]
    fd = image.create("test", machine.checkpoint.image_bytes)
    image.fill(machine.checkpoint, fd)
    _, memory = machine.fill(image_fd=fd if from_image else None, extents=extents)
    machine.images.detach(fd)
    os.close(fd)
    assert torch.equal(memory[64 : 64 + 140_000].view(torch.bfloat16), wide.bfloat16())


def test_checked_against_a_manifest(machine: Machine) -> None:
    manifest = Manifest.make(machine.checkpoint, extent_bytes=48 * KiB)
    machine.check(machine.fill(Options(verify=manifest))[1])
    assert machine.runtime.pageable_copies == 0
    path = machine.checkpoint.shards[1].path
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    with pytest.raises(DigestMismatch, match=r"2\.safetensors.*manifest"):
        machine.fill(Options(verify=manifest))


@pytest.mark.parametrize("ways", [{Way.RING}, {Way.MAPPED}, {Way.DIRECT}])
@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_a_cancelled_load_drains_and_holds_nothing(machine: Machine, ways: set[Way], at: int) -> None:
    cancel, seen = threading.Event(), []

    def at_copy() -> None:
        seen.append(1)
        if len(seen) == at:
            cancel.set()

    machine.profile = replace(FEW, window_bytes=64 * KiB)
    machine.runtime.at_copy = at_copy
    with pytest.raises(Cancelled):
        machine.fill(Options(ways=ways, cancel=cancel))
    assert machine.runtime.registered == {}
    assert machine.rings.idle_bytes == 0


@pytest.mark.parametrize("by", [8, 250_000])
@pytest.mark.parametrize("ways", [{Way.RING}, {Way.MAPPED}, {Way.DIRECT}, {Way.BUFFERED}])
def test_a_file_that_shrinks_is_an_error_that_names_it(machine: Machine, ways: set[Way], by: int) -> None:
    path = machine.checkpoint.shards[1].path
    size = path.stat().st_size
    machine.runtime.at_copy = lambda: os.truncate(path, size - by)
    machine.profile = replace(FEW, threads=1)
    with pytest.raises(ReadError, match=r"2\.safetensors"):
        machine.fill(Options(ways=ways))
    assert machine.runtime.registered == {}


def test_one_buffer_of_a_mebibyte_holds_every_chunk(machine: Machine) -> None:
    machine.profile = Profile(cores=1, threads=1, buffer_bytes=MiB, buffers=1)
    for ways in ({Way.RING}, {Way.DIRECT}):
        machine.check(machine.fill(Options(ways=ways))[1])


@pytest.mark.parametrize("ways", [EVERY_WAY, {Way.DIRECT}])
@pytest.mark.parametrize("profile", [PROFILE, FEW])
def test_an_image_is_filled_in_the_same_pass(machine: Machine, profile: Profile, ways: set[Way]) -> None:
    machine.profile = profile
    fd = image.create("test", machine.checkpoint.image_bytes)
    filled, memory = machine.fill(Options(ways=ways, fill_image_fd=fd))
    machine.check(memory)
    assert "mapped" not in filled.by_way
    machine.check(machine.fill(image_fd=fd)[1])
    machine.images.detach(fd)
    os.close(fd)


def test_what_is_on_the_disk_is_read_as_a_disk_wants_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(share: float | None, fd: int | None = None) -> tuple[object, object]:
        monkeypatch.setattr(Source, "resident_share", lambda source, *where: share)
        machine.fill(Options(fill_image_fd=fd))
        return machine.asked["cold"], machine.asked["tee"]

    assert asked(1.0) == (False, False)
    assert asked(None) == (False, False)
    assert asked(0.6) == (False, False)
    assert asked(0.4) == (True, False)
    fd = image.create("test", machine.checkpoint.image_bytes)
    assert asked(0.0, fd) == (True, True)
    os.close(fd)
