"""The loader on a CUDA device."""

import os
import threading
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from mball.device.cuda import CudaRuntime, CudaStream
from mball.device.host import usable_cpus
from mball.device.mapping import Mapping
from mball.errors import Cancelled, DeviceOutOfMemory, RegistrationFailed, SwapMiss
from mball.loader import Checkpoint, Slice, Way, Weights, image, load, stream, tune
from mball.loader import fill as filling
from mball.loader.paths import FEW_CORES
from mball.loader.registered import IMAGES
from mball.loader.ring import RINGS
from mball.loader.slab import CudaSlab
from mball.loader.tuning import Profile
from mball.swap.stored_image import StoredImage
from mball.units import GiB, MiB
from tests.swap.test_stored_image import flip, stored

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    """Several times the ring, so that every buffer is used again."""
    torch.manual_seed(0)
    tensors = {f"w{number}": torch.randn(1024, 4096 + number).bfloat16() for number in range(24)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 3), "ids": torch.arange(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_bit_for_bit(tmp_path: Path, tensors: dict[str, Tensor], threads: int) -> None:
    for _ in range(3):
        loaded = load(tmp_path, "cuda", threads=threads)
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].device.type == "cuda"
            assert torch.equal(loaded[name].cpu(), tensor)


@pytest.mark.parametrize("wanted", [None, torch.float32])
def test_released_memory_is_free_and_views_come_back(tmp_path: Path, wanted: torch.dtype | None) -> None:
    wide = {"weight": torch.randn(8192, 8192).bfloat16(), "bias": torch.randn(8192).bfloat16()}
    save_file(wide, tmp_path / "model.safetensors")
    with init_empty_weights():
        linear = nn.Linear(8192, 8192, dtype=torch.bfloat16)
    device = torch.device("cuda")
    torch.cuda.init()
    torch.cuda.empty_cache()
    weights = Weights.bind(linear, Checkpoint.open(tmp_path), device=device, dtype=wanted)
    # The first load brings kernels into the context, which stay.
    weights.load(threads=4)
    weights.release()
    free_bytes = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        weights.load(threads=4)
        assert free_bytes - torch.cuda.mem_get_info()[0] >= weights.nbytes
        assert torch.equal(linear.weight.cpu(), wide["weight"].to(wanted or torch.bfloat16))
        assert torch.equal(linear.bias.cpu(), wide["bias"].to(wanted or torch.bfloat16))
        assert weights.release() == weights.nbytes
        assert free_bytes - torch.cuda.mem_get_info()[0] < 32 * MiB


def test_slow_copies_are_waited_for_before_a_buffer_is_used_again_and_at_the_end(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = CudaStream.copy

    def slow(stream: CudaStream, target: int, source: int, nbytes: int) -> None:
        torch.cuda._sleep(50_000_000)
        copy(stream, target, source, nbytes)

    monkeypatch.setattr(CudaStream, "copy", slow)
    RINGS.release()
    monkeypatch.setattr(filling, "profile", lambda threads, **how: Profile(16, 2, 2 * MiB, 2))
    loaded = load(tmp_path, "cuda", threads=2)
    # From the end of the file: what was copied last would be missing first.
    for name in sorted(loaded, key=lambda name: loaded[name].data_ptr(), reverse=True):
        assert torch.equal(loaded[name].cpu(), tensors[name])


@pytest.mark.parametrize("way", list(Way))
def test_every_way_alone(tmp_path: Path, tensors: dict[str, Tensor], way: Way) -> None:
    for _ in range(2):
        loaded = load(tmp_path, "cuda", ways={way})
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name].cpu(), tensor)


def test_from_an_image_by_its_registered_pages(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint.open(tmp_path)
    with init_empty_weights():
        holder = nn.ParameterDict({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()})
    weights = Weights.bind(holder, checkpoint, device=torch.device("cuda"))
    fd = image.create("test", checkpoint.image_bytes)
    image.fill(checkpoint, fd)
    image.seal(fd)
    for _ in range(2):
        assert weights.load(fd).by_way.keys() == {"mapped"}
        for name, tensor in tensors.items():
            assert torch.equal(holder[name].cpu(), tensor)
        weights.release()
    IMAGES.detach(fd)
    os.close(fd)


def test_straight_from_the_slots_of_a_store(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint.open(tmp_path)
    with init_empty_weights():
        holder = nn.ParameterDict({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()})
    weights = Weights.bind(holder, checkpoint, device=torch.device("cuda"))
    with stored(checkpoint, tmp_path, 2 * MiB) as (store, place):
        (tmp_path / "model.safetensors").rename(tmp_path / "away")
        for _ in range(2):
            stats = weights.load(stored=StoredImage(store.slots, place).read)
            assert set(stats.by_way) <= {"ring", "buffered"}
            for name, tensor in tensors.items():
                assert torch.equal(holder[name].cpu(), tensor)
            weights.release()
        flip(store, place, checkpoint.image_bytes // 2)
        before = torch.cuda.mem_get_info()[0]
        with pytest.raises(SwapMiss):
            weights.load(stored=StoredImage(store.slots, place).read)
        assert torch.cuda.mem_get_info()[0] >= before


def test_a_refused_registration_is_an_error_that_no_kernel_reports() -> None:
    runtime = CudaRuntime(torch.device("cuda", 0))
    mapping = Mapping(MiB)
    mapping.populate(0, MiB)
    runtime.register(mapping.address, MiB)
    with pytest.raises(RegistrationFailed):
        runtime.register(mapping.address, MiB)
    assert torch.ones(3, device="cuda").sum() == 3
    runtime.unregister(mapping.address)
    runtime.unregister(mapping.address)
    assert torch.ones(3, device="cuda").sum() == 3
    mapping.close()


def test_cancelled_and_too_large_loads_leave_nothing(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with init_empty_weights():
        holder = nn.ParameterDict({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()})
    weights = Weights.bind(holder, Checkpoint.open(tmp_path), device=torch.device("cuda"))
    cancel = threading.Event()
    allocated_bytes = torch.cuda.memory_allocated()
    copy = CudaStream.copy
    monkeypatch.setattr(CudaStream, "copy", lambda stream, *copied: (copy(stream, *copied), cancel.set())[0])
    # Each thread takes one buffer of the twelve, and then sees it.
    with pytest.raises(Cancelled):
        weights.load(threads=8, ways={Way.RING}, cancel=cancel)
    assert torch.cuda.memory_allocated() == allocated_bytes
    with pytest.raises(DeviceOutOfMemory):
        CudaSlab(4096 * GiB, torch.device("cuda")).populate()
    assert torch.cuda.memory_allocated() == allocated_bytes


def test_a_probe_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned = tune("cuda")
    assert tuned.choice.threads >= 1
    assert bool(tuned.rates) == (usable_cpus() > FEW_CORES)
    assert (tmp_path / "mball/loader-probe.json").exists() == (usable_cpus() > FEW_CORES)


def test_parts_of_tensors_and_a_stream(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for rank in range(4):
        loaded = load(tmp_path, "cuda", include={"w*"}, slices={"w*[02468]": Slice(0, rank, 4), "w7": Slice(1, 0, 1)})
        for name, tensor in loaded.items():
            wanted = tensors[name].chunk(4)[rank] if name[-1] in "02468" else tensors[name]
            assert torch.equal(tensor.cpu(), wanted)
    assert all(torch.equal(tensor.cpu(), tensors[name]) for name, tensor in stream(tmp_path, "cuda"))
