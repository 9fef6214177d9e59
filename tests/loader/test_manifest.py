import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from mball.errors import BadManifest, Cancelled, DigestMismatch
from mball.loader import Checkpoint, Weights, image, load
from mball.loader.checkpoint import Shard
from mball.loader.manifest import MANIFEST_FILE, Manifest
from mball.loader.plan import Cast, Extent
from mball.loader.reader import Source
from mball.loader.verify import Verifier
from mball.server.models.cli import app
from tests.loader.files import open_descriptors, write_sharded

EXTENT = 4098  # ends within elements
ODD = torch.arange(5001, dtype=torch.uint8)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Sizes that end nowhere near a multiple of an extent, and odd ones between."""
    generator = torch.Generator().manual_seed(0)
    made = {f"w{number}": torch.randn(37 + number, 61, generator=generator) for number in range(9)}
    return {**made, "odd": ODD, "scalar": torch.tensor(2.0), "empty": torch.empty(0, 4)}


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    write_sharded(tmp_path, {file: {name: tensors[name] for name in part} for file, part in parts.items()})
    return Checkpoint.open(tmp_path)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    before = len(open_descriptors())
    yield
    assert len(open_descriptors()) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mball-read")]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


class Rows(nn.Module):
    """Holds the tensors of a checkpoint as float16: every one of them is cast, whatever bytes it begins at."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            dtype = torch.float16 if tensor.is_floating_point() else tensor.dtype
            meta = torch.empty(tensor.shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(meta, requires_grad=False))


def test_written_and_read_again_beside_a_folder_and_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = Manifest.make(checkpoint, extent_bytes=EXTENT, threads=3)
    assert made.write(checkpoint) == tmp_path / MANIFEST_FILE
    assert Manifest.open(checkpoint) == made
    assert not list(tmp_path.glob("*.tmp"))
    single = Checkpoint.open(tmp_path / "a.safetensors")
    path = Manifest.make(single).write(single)
    assert path == tmp_path / f"a.safetensors.{MANIFEST_FILE}"
    assert set(Manifest.open(single).shards) == {"a.safetensors"}


def test_digests_are_those_of_the_file(checkpoint: Checkpoint) -> None:
    made = Manifest.make(checkpoint, extent_bytes=EXTENT)
    for shard in checkpoint.shards:
        content = shard.path.read_bytes()
        head, data = content[: shard.data_start], content[shard.data_start :]
        found = made.shards[shard.path.name]
        assert found.size_bytes == len(content)
        assert found.header == xxhash.xxh3_64_hexdigest(head)
        wanted = [xxhash.xxh3_64_hexdigest(data[at : at + EXTENT]) for at in range(0, len(data), EXTENT)]
        assert list(found.extents) == wanted


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_whole_loads_with_and_without_casts_and_into_an_image(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], threads: int
) -> None:
    made = Manifest.make(checkpoint, extent_bytes=EXTENT)
    loaded = load(checkpoint.path, threads=threads, verify=made)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    module = Rows(tensors)
    weights = Weights.bind(module, checkpoint, device=torch.device("cpu"))
    weights.load(threads=threads, verify=made)
    assert all(
        torch.equal(parameter, tensors[name].to(parameter.dtype)) for name, parameter in module.named_parameters()
    )
    weights.release()
    fd = image.create("test", checkpoint.image_bytes)
    try:
        image.fill(checkpoint, fd, threads=threads, verify=made)
        weights.load(fd, threads=threads, verify=made)
        os.pwrite(fd, b"\xff\x00\xff", checkpoint.shards[1].image_offset + 2 * EXTENT)
        with pytest.raises(DigestMismatch, match=r"b\.safetensors: .*extent 2"):
            weights.load(fd, threads=threads, verify=made)
    finally:
        os.close(fd)


def test_any_flipped_bit_names_file_extent_and_tensor_and_nothing_is_kept(
    checkpoint: Checkpoint, tensors: dict[str, Tensor]
) -> None:
    made = Manifest.make(checkpoint, extent_bytes=EXTENT)
    module = Rows(tensors)
    weights = Weights.bind(module, checkpoint, device=torch.device("cpu"))
    picks = random.Random(1)
    for shard in checkpoint.shards:
        for at in (shard.data_start, shard.size_bytes - 1, *picks.sample(range(shard.data_start, shard.size_bytes), 8)):
            flip(shard.path, at)
            for read in (lambda: load(checkpoint.path, verify=made), lambda: weights.load(verify=made)):
                with pytest.raises(DigestMismatch) as raised:
                    read()
                assert raised.value.file == str(shard.path)
                assert raised.value.extent == (at - shard.data_start) // EXTENT
                assert raised.value.tensor in tensors
                assert weights.release() == 0
            with pytest.raises(DigestMismatch):
                made.check(checkpoint, Manifest.make(checkpoint, extent_bytes=EXTENT))
            flip(shard.path, at)
    load(checkpoint.path, verify=made)
    made.check(checkpoint, Manifest.make(checkpoint, extent_bytes=EXTENT))


def test_the_tensor_named_is_in_the_extent(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(3 * EXTENT, dtype=torch.uint8), "b": torch.zeros(7), "c": torch.zeros(9)}, tmp_path / "m"
    )
    checkpoint = Checkpoint.open(tmp_path / "m")
    made = Manifest.make(checkpoint, extent_bytes=EXTENT)
    flip(tmp_path / "m", checkpoint.tensors["a"].start + EXTENT)
    with pytest.raises(DigestMismatch, match="extent 1, bytes") as raised:
        load(tmp_path / "m", verify=made)
    assert raised.value.tensor == checkpoint.tensor_at(0, checkpoint.shards[0].data_start + EXTENT)


def test_bytes_that_nothing_wants_are_checked_too(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    made = Manifest.make(checkpoint, extent_bytes=EXTENT)
    wanted = checkpoint.tensors["w0"]
    parts = [Extent(wanted.shard, wanted.start + 5, 10, 0)]
    (unit,) = made.verifier(checkpoint).units(parts)
    source = Source(checkpoint)
    try:
        check = made.verifier(checkpoint).begin(unit, source)
        for part in unit:
            buffer = bytearray(part.nbytes)
            source.read_into(memoryview(buffer), part.shard, part.start)
            check.update(part, memoryview(buffer))
        check.end()
    finally:
        source.close()


@settings(max_examples=200, deadline=None)
@given(
    begin=st.integers(0, 300),
    count=st.integers(1, 400),
    itemsize=st.sampled_from([1, 2, 4]),
    extent_bytes=st.integers(1, 64),
)
def test_units_hold_the_same_bytes_in_whole_elements(begin: int, count: int, itemsize: int, extent_bytes: int) -> None:
    source = {1: torch.uint8, 2: torch.float16, 4: torch.float32}[itemsize]
    cast = Cast(source, torch.float64)
    nbytes = count * itemsize
    data_start = 40
    shard = Shard(Path("x"), data_start + begin + nbytes, data_start, 0)
    checkpoint = Checkpoint(Path("x"), (shard,), {}, nbytes, 0)
    units = Verifier(checkpoint, extent_bytes, [[]]).units([Extent(0, data_start + begin, nbytes, 8, cast)])
    at, offset = data_start + begin, 8
    for unit in units:
        ends = {(part.start + part.nbytes - 1 - data_start) // extent_bytes for part in unit}
        assert len(ends) == 1
        for part in unit:
            assert (part.start, part.offset, part.nbytes % itemsize) == (at, offset, 0)
            at += part.nbytes
            offset += cast.target_bytes(part.nbytes)
    assert at == data_start + begin + nbytes


def test_a_changed_header_is_a_mismatch_of_no_extent(checkpoint: Checkpoint) -> None:
    Manifest.make(checkpoint).write(checkpoint)
    path = checkpoint.shards[0].path
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"w0"', b'"v0"'))
    with pytest.raises(DigestMismatch, match="header") as raised:
        Manifest.open(checkpoint)
    assert raised.value.extent is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not a manifest"),
        ('{"version": 9}', "version 9"),
        ('{"version": 1, "extent_bytes": 0, "shards": {}}', "extents of 0 bytes"),
        ('{"version": 1, "extent_bytes": 4096, "shards": {}}', "no digests of a.safetensors"),
        ('{"version": 1, "extent_bytes": 4096, "shards": {"a.safetensors": {"size_bytes": 1}}}', "not a manifest"),
        (
            '{"version": 1, "extent_bytes": 4096, "shards": '
            '{"a.safetensors": {"size_bytes": 1, "header": "", "extents": []}}}',
            "of 1 bytes, this one has",
        ),
    ],
)
def test_what_is_no_manifest_of_this_model(checkpoint: Checkpoint, content: str, message: str) -> None:
    (checkpoint.path / MANIFEST_FILE).write_text(content)
    with pytest.raises(BadManifest, match=message):
        Manifest.open(checkpoint)


def test_a_digest_too_few_and_none_at_all(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadManifest, match="mball models manifest"):
        Manifest.open(checkpoint)
    path = Manifest.make(checkpoint, extent_bytes=EXTENT).write(checkpoint)
    parsed = json.loads(path.read_text())
    parsed["shards"]["b.safetensors"]["extents"].pop()
    path.write_text(json.dumps(parsed))
    with pytest.raises(BadManifest, match=r"digests of b\.safetensors, which has"):
        Manifest.open(checkpoint)


def test_making_one_can_be_cancelled(checkpoint: Checkpoint) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        Manifest.make(checkpoint, cancel=cancel)


def test_the_command_writes_and_checks(checkpoint: Checkpoint) -> None:
    run = CliRunner().invoke
    assert run(app, ["manifest", str(checkpoint.path)]).exit_code == 0
    checked = run(app, ["manifest", str(checkpoint.path), "--check"])
    assert "as mball-manifest.json says" in checked.output
    load(checkpoint.path, verify=Manifest.open(checkpoint))
    flip(checkpoint.shards[1].path, checkpoint.shards[1].size_bytes - 1)
    broken = run(app, ["manifest", str(checkpoint.path), "--check"])
    assert isinstance(broken.exception, DigestMismatch)
