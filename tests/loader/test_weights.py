import os
import threading
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mball.errors import Cancelled, CheckpointError, DeviceOutOfMemory, ReadError, TensorMismatch
from mball.loader import Checkpoint, Piece, Weights, image
from mball.loader.slab import HostSlab
from tests.loader.files import mapping_of, open_descriptors, write_sharded
from tests.loader.test_slab import Ledger

CPU = torch.device("cpu")


class Net(nn.Module):
    """A linear layer, a tied one, a persistent and a computed buffer."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 33)
        self.up = nn.Linear(33, 70)
        self.head = nn.Linear(33, 50, bias=False)
        self.register_buffer("scale", torch.full((3,), 7.0))
        self.register_buffer("inv_freq", torch.arange(5.0), persistent=False)
        if tied:
            self.tie()

    def tie(self) -> None:
        self.head.weight = self.embed.weight


def meta(tied: bool = True) -> Net:
    with init_empty_weights(include_buffers=False):
        net = Net(tied=False)
    if tied:
        net.tie()
    return net


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in net.state_dict().items() if name != "head.weight"}


@pytest.fixture
def reference() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def checkpoint(tmp_path: Path, reference: Net) -> Checkpoint:
    tensors = state(reference)
    half = dict(list(tensors.items())[:2])
    rest = {name: tensor for name, tensor in tensors.items() if name not in half}
    return Checkpoint.open(write_sharded(tmp_path, {"1.safetensors": half, "2.safetensors": rest}))


def same(net: nn.Module, reference: nn.Module) -> bool:
    ours, theirs = net.state_dict(), reference.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_meta_module_is_filled_released_and_filled_again(checkpoint: Checkpoint, reference: Net) -> None:
    net, ledger = meta(), Ledger(10**6)
    weights = Weights.bind(net, checkpoint, device=CPU, account=ledger)
    assert ledger.taken_bytes == 0
    address = net.up.weight.data_ptr()
    assert mapping_of(address)[1]["Rss"] == 0
    for _ in range(3):
        calls: list[tuple[int, int]] = []
        stats = weights.load(threads=2, progress=lambda done, total, calls=calls: calls.append((done, total)))
        assert stats.bytes == checkpoint.nbytes == calls[-1][0] == calls[-1][1]
        assert stats.seconds > 0
        assert same(net, reference)
        assert net.up.weight.data_ptr() == address
        assert ledger.taken_bytes == weights.nbytes >= checkpoint.nbytes
        assert weights.release() == weights.nbytes
        assert ledger.taken_bytes == 0
        assert mapping_of(address)[1]["Rss"] == 0
    weights.close()


def test_the_module_computes_as_the_reference(checkpoint: Checkpoint, reference: Net) -> None:
    net = meta()
    Weights.bind(net, checkpoint, device=CPU).load()
    tokens = torch.tensor([1, 2, 49])
    with torch.no_grad():
        assert torch.equal(net.head(net.embed(tokens)), reference.head(reference.embed(tokens)))
    assert net.head.weight is net.embed.weight
    assert not net.up.weight.requires_grad


def test_a_tied_tensor_is_found_under_its_other_name(tmp_path: Path, reference: Net) -> None:
    tensors = state(reference)
    tensors["head.weight"] = tensors.pop("embed.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    net = meta()
    weights = Weights.bind(net, Checkpoint.open(tmp_path), device=CPU)
    weights.load()
    assert same(net, reference)
    assert weights.nbytes < sum(tensor.nbytes for tensor in tensors.values()) + 64 * len(tensors)


def test_buffers_keep_their_values(tmp_path: Path, reference: Net) -> None:
    tensors = state(reference)
    del tensors["scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    net = meta()
    Weights.bind(net, Checkpoint.open(tmp_path), device=CPU).load()
    assert net.scale.tolist() == [7.0, 7.0, 7.0]
    assert net.inv_freq.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_buffer_without_a_value_is_an_error(checkpoint: Checkpoint) -> None:
    with init_empty_weights(include_buffers=True):
        net = Net()
    net.tie()
    with pytest.raises(TensorMismatch, match="buffers without a value: inv_freq"):
        Weights.bind(net, checkpoint, device=CPU)


def test_loading_from_an_image_needs_no_file(checkpoint: Checkpoint, reference: Net) -> None:
    fd = image.create("test", checkpoint.image_bytes)
    image.fill(checkpoint, fd)
    image.seal(fd)
    net = meta()
    weights = Weights.bind(net, checkpoint, device=CPU)
    for shard in checkpoint.shards:
        shard.path.unlink()
    for _ in range(2):
        weights.load(fd)
        assert same(net, reference)
        weights.release()
    os.close(fd)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes_are_cast_on_the_way(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    torch.manual_seed(1)
    tensors = {"weight": torch.randn(1500, 2001).to(stored), "bias": torch.randn(1500).to(stored)}
    save_file(tensors, tmp_path / "model.safetensors")
    with init_empty_weights():
        linear = nn.Linear(2001, 1500)
    Weights.bind(linear, Checkpoint.open(tmp_path), device=CPU, dtype=wanted).load(threads=3)
    for name, tensor in tensors.items():
        assert torch.equal(linear.state_dict()[name], tensor.to(wanted))


def test_without_a_dtype_the_module_says(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(4, 4).bfloat16(), "bias": torch.randn(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with init_empty_weights():
        linear = nn.Linear(4, 4, dtype=torch.bfloat16)
    Weights.bind(linear, Checkpoint.open(tmp_path), device=CPU).load()
    assert torch.equal(linear.bias, tensors["bias"].bfloat16())
    assert torch.equal(linear.weight, tensors["weight"])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(3, 8, 5))


@pytest.mark.parametrize("wanted", [None, torch.bfloat16])
def test_pieces_fill_a_fused_tensor(tmp_path: Path, wanted: torch.dtype | None) -> None:
    torch.manual_seed(2)
    parts = {f"{expert}.{half}": torch.randn(4, 5) for expert in range(3) for half in ("gate", "up")}
    save_file(parts, tmp_path / "model.safetensors")
    with init_empty_weights():
        experts = Experts()
    size = 4 * 5 * (wanted or torch.float32).itemsize
    pieces = [Piece(name, number * size) for number, name in enumerate(parts)]
    Weights.bind(experts, Checkpoint.open(tmp_path), device=CPU, dtype=wanted, sources={"gate_up": pieces[::-1]}).load()
    fused = torch.stack([torch.cat([parts[f"{expert}.gate"], parts[f"{expert}.up"]]) for expert in range(3)])
    assert torch.equal(experts.gate_up, fused.to(wanted or torch.float32))
    for wrong in (pieces[:-1], [Piece(piece.tensor, piece.offset + 4) for piece in pieces], [*pieces, pieces[0]]):
        with init_empty_weights():
            experts = Experts()
        with pytest.raises(TensorMismatch, match="gate_up"):
            Weights.bind(experts, Checkpoint.open(tmp_path), device=CPU, dtype=wanted, sources={"gate_up": wrong})


def test_one_expert_is_a_fused_tensor_too(tmp_path: Path) -> None:
    save_file({"0.w": torch.randn(8, 5)}, tmp_path / "model.safetensors")
    with init_empty_weights():
        experts = Experts()
        experts.gate_up = nn.Parameter(torch.empty(1, 8, 5))
    Weights.bind(experts, Checkpoint.open(tmp_path), device=CPU, sources={"gate_up": [Piece("0.w")]}).load()
    assert torch.equal(experts.gate_up[0], load_file(tmp_path / "model.safetensors")["0.w"])


def bind_error(tmp_path: Path, tensors: dict[str, Tensor]) -> str:
    save_file(tensors, tmp_path / "model.safetensors")
    with init_empty_weights():
        linear = nn.Linear(4, 3)
    with pytest.raises(TensorMismatch) as raised:
        Weights.bind(linear, Checkpoint.open(tmp_path), device=CPU)
    assert linear.weight.is_meta
    return str(raised.value)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    right = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    assert "missing: bias" in bind_error(tmp_path, {"weight": right["weight"]})
    assert "unexpected: extra" in bind_error(tmp_path, right | {"extra": torch.randn(1)})
    assert "weight has shape [4, 3], weight has [3, 4]" in bind_error(tmp_path, right | {"weight": torch.randn(4, 3)})
    assert "bias is I32" in bind_error(tmp_path, right | {"bias": torch.zeros(3, dtype=torch.int32)})
    message = bind_error(tmp_path, {f"x{number}": torch.zeros(1) for number in range(20)})
    assert "missing: weight, bias; unexpected: x0" in message
    assert "and 12 more" in message


def test_what_is_to_be_ignored_is(tmp_path: Path) -> None:
    save_file(
        {"weight": torch.ones(3, 4), "bias": torch.ones(3), "extra": torch.ones(9)}, tmp_path / "model.safetensors"
    )
    with init_empty_weights():
        linear = nn.Linear(4, 3)
    assert Weights.bind(linear, Checkpoint.open(tmp_path), device=CPU, ignore={"extra"}).load().bytes == 60


@pytest.mark.parametrize("defect", ["truncated", "missing", "shrinks"])
def test_a_failing_shard_leaves_nothing_on_the_device(
    checkpoint: Checkpoint, defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, ledger, before = meta(), Ledger(10**6), open_descriptors()
    weights = Weights.bind(net, checkpoint, device=CPU, account=ledger)
    path = checkpoint.shards[1].path
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        if defect == "missing":
            path.unlink()
        elif defect == "truncated":
            path.write_bytes(content[:-1])
        else:
            memory = HostSlab.memory
            patch.setattr(HostSlab, "memory", lambda slab: (os.truncate(path, len(content) - 8), memory(slab))[1])
        with pytest.raises(ReadError, match=r"2\.safetensors"):
            weights.load()
    assert ledger.taken_bytes == 0
    assert mapping_of(net.up.weight.data_ptr())[1]["Rss"] == 0
    assert open_descriptors() == before
    path.write_bytes(content)
    weights.load()
    assert net.scale.tolist() == [7.0, 7.0, 7.0]


def test_a_cancelled_load_leaves_nothing_on_the_device(checkpoint: Checkpoint) -> None:
    ledger, cancel = Ledger(10**6), threading.Event()
    weights = Weights.bind(meta(), checkpoint, device=CPU, account=ledger)
    cancel.set()
    with pytest.raises(Cancelled):
        weights.load(cancel=cancel)
    assert ledger.taken_bytes == 0


def test_a_device_without_room(checkpoint: Checkpoint) -> None:
    ledger, before = Ledger(1000), open_descriptors()
    weights = Weights.bind(meta(), checkpoint, device=CPU, account=ledger)
    with pytest.raises(DeviceOutOfMemory):
        weights.load()
    assert ledger.taken_bytes == 0
    assert open_descriptors() == before


def test_errors_name_the_checkpoint(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=str(checkpoint.path)):
        Weights.bind(nn.Linear(1, 1), checkpoint, device=CPU)


def test_an_image_is_filled_while_loading_and_is_whole(tmp_path: Path, reference: Net) -> None:
    extra = state(reference) | {"a.unused": torch.arange(1000), "z.unused": torch.arange(77)}
    save_file(extra, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    net = meta()
    weights = Weights.bind(net, checkpoint, device=CPU, dtype=torch.bfloat16, ignore={"a.unused", "z.unused"})
    filled, copied = (image.create("test", checkpoint.image_bytes) for _ in range(2))
    weights.load(fill_image_fd=filled)
    image.fill(checkpoint, copied)
    assert os.pread(filled, checkpoint.image_bytes, 0) == os.pread(copied, checkpoint.image_bytes, 0)
    assert torch.equal(net.up.weight, reference.up.weight.bfloat16())
    os.close(filled)
    os.close(copied)
