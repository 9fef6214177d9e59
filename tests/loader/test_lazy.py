"""Tensors that are read as far as they are used, by loaders that cut as those of tensor parallel layers do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mball.errors import CheckpointError
from mball.loader.checkpoint import Checkpoint
from mball.loader.lazy import LazyTensor
from mball.loader.lazy_stream import LazyStream
from mball.loader.selection import Wanted

LAYERS = 12
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"embed.weight": made(32, 16), "norm.weight": made(16), "scale": made(1), "unused": made(64, 64)}
    for layer in range(LAYERS):
        tensors |= {
            f"layers.{layer}.column.weight": made(64, 16, dtype=torch.bfloat16),
            f"layers.{layer}.row.weight": made(16, 64),
            f"layers.{layer}.qkv.weight": made(48, 16),
            f"layers.{layer}.norm.weight": made(16),
            f"layers.{layer}.extra": made(8, 8),
        }
    return tensors


@pytest.fixture(scope="module")
def checkpoint(stored: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("lazy")
    save_file(stored, folder / "model.safetensors")
    return Checkpoint.open(folder)


def kept(name: str, tensor: Tensor, rank: int) -> list[Tensor]:
    """What a rank of two keeps of each, as copies."""

    def half(whole: Tensor, dim: int) -> Tensor:
        size = whole.shape[dim] // 2
        return whole.narrow(dim, rank * size, size)

    if "column" in name or "embed" in name:
        parts = [half(tensor, 0)]
    elif "row" in name:
        parts = [half(tensor, 1)]
    elif "qkv" in name:
        # Three in one, of different sizes; each is cut twice.
        parts = [half(tensor.narrow(0, begin, size), 0) for begin, size in ((0, 32), (32, 8), (40, 8))]
    elif "unused" in name or "extra" in name:
        parts = []
    else:
        parts = [tensor]
    return [torch.empty(part.shape, dtype=part.dtype).copy_(part) for part in parts]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("group_bytes", [1, 5_000, 1 << 28])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_keeps_is_read_and_nothing_else(
    checkpoint: Checkpoint, stored: dict[str, Tensor], rank: int, group_bytes: int
) -> None:
    stream, nbytes, names = LazyStream(checkpoint, CPU, group_bytes), 0, []
    for name, tensor in stream:
        assert tensor.shape == stored[name].shape
        assert tensor.dtype == stored[name].dtype
        found = kept(name, tensor, rank)
        assert same(found, kept(name, stored[name], rank))
        nbytes += sum(part.nbytes for part in found)
        names.append(name)
    assert names == sorted(stored)
    assert stream.read_bytes == nbytes


def test_layers_but_the_first_are_read_ahead(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    load = LazyStream._load

    def counted(self: LazyStream, wanted: list[Wanted], cancel: threading.Event) -> list[Tensor]:
        loads.append(len(wanted))
        return load(self, wanted, cancel)

    monkeypatch.setattr(LazyStream, "_load", counted)
    for name, tensor in LazyStream(checkpoint, CPU):
        kept(name, tensor, 0)
    # Column, row, norm, and qkv in three; of the second layer its row alone comes with the others.
    assert max(loads) == 6 * (LAYERS - 1) - 5
    assert sum(loads) == 6 * LAYERS + 3


def test_a_layer_that_is_used_otherwise_is_right_all_the_same(
    checkpoint: Checkpoint, stored: dict[str, Tensor]
) -> None:
    for name, tensor in LazyStream(checkpoint, CPU):
        rank = 1 if ".7." in name else 0
        assert same(kept(name, tensor, rank), kept(name, stored[name], rank))
        if ".5.extra" in name:
            assert torch.equal(tensor + 0, stored[name])


def test_what_is_put_by_until_its_layer_is_whole_is_read_ahead_too(
    checkpoint: Checkpoint, stored: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[Wanted] = []
    read = LazyStream._read
    monkeypatch.setattr(LazyStream, "_read", lambda self, wanted: (alone.append(wanted), read(self, wanted))[1])
    layers: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in LazyStream(checkpoint, CPU, group_bytes=1 << 13):
        layers.setdefault(".".join(name.split(".")[:2]), []).append((name, tensor))
        if name.endswith("row.weight"):
            for each, put_by in layers[".".join(name.split(".")[:2])]:
                assert same(kept(each, put_by, 0), kept(each, stored[each], 0))
    assert 0 < len(alone) < 6 * LAYERS // 2


def test_those_that_are_kept_for_later_are_read_later(checkpoint: Checkpoint, stored: dict[str, Tensor]) -> None:
    tensors = dict(LazyStream(checkpoint, CPU))
    assert all(same(kept(name, tensors[name], 1), kept(name, stored[name], 1)) for name in stored)


def test_who_leaves_early_leaves_no_thread(checkpoint: Checkpoint) -> None:
    stream = iter(LazyStream(checkpoint, CPU))
    assert isinstance(stream, Iterator)
    for _ in range(20):
        kept(*next(stream), 0)
    stream.close()  # type: ignore[attr-defined]


def test_what_is_written_to_it_stays(checkpoint: Checkpoint, stored: dict[str, Tensor]) -> None:
    tensor = dict(LazyStream(checkpoint, CPU))["norm.weight"]
    assert isinstance(tensor, LazyTensor)
    assert "read=False" in repr(tensor)
    tensor.mul_(2)
    tensor[3:5] = 7
    expected = stored["norm.weight"] * 2
    expected[3:5] = 7
    assert torch.equal(tensor[:8], expected[:8])
    assert torch.equal(tensor.clone(), expected)
    assert "read=True" in repr(tensor)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t[4:9].mul_(2),
        lambda t: t.t()[3].zero_(),
        lambda t: t[4:9].view(-1).add_(1),
        lambda t: t[2:5].copy_(t[7:10]),
        lambda t: torch.mul(t[:4], 3, out=t[4:8]),
        lambda t: t.narrow(1, 2, 3).reshape(32, 3, 1).fill_(5),
        lambda t: (t[:4] + 0, t[2:6].mul_(2)),
        lambda t: t[1].expand(3, 16)[0].mul_(4),
        lambda t: torch._foreach_mul_([t[0:2], t[5:7]], 2.0),
    ],
)
def test_what_is_written_to_one_view_is_there_in_all(
    checkpoint: Checkpoint, stored: dict[str, Tensor], write: object
) -> None:
    assert callable(write)
    tensor, plain = dict(LazyStream(checkpoint, CPU))["embed.weight"], stored["embed.weight"].clone()
    before, rows = tensor[3:8], plain[3:8]
    write(tensor)
    write(plain)
    assert torch.equal(before + 0, rows)
    assert torch.equal(tensor + 0, plain)


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t.narrow(1, 4, 8).reshape(-1),
        lambda t: t[3:5].flatten(),
        lambda t: t.float().t().reshape(-1),
        lambda t: torch.cat([t, t[3:5]]),
        lambda t: t[2],
        lambda t: t[-3:, 4:],
        lambda t: t.narrow(1, 2, 8).narrow(1, 1, 3),
        lambda t: t[::2],
        lambda t: t[5:3],
        lambda t: t.chunk(4, dim=1)[2],
        lambda t: torch.split(t, [3, 13], dim=1)[1],
        lambda t: t.detach()[1:2].contiguous(),
        lambda t: t.to(torch.float64).sum(),
        lambda t: t.unsqueeze(0)[0, 1:3],
        lambda t: torch.stack(list(t.unbind(0))),
        lambda t: t.view(-1, 8),
        lambda t: t.t()[3:9],
        lambda t: t.t().contiguous().view(-1),
        lambda t: t.transpose(-1, 0).narrow(1, 8, 8),
        lambda t: t.unsqueeze(0).narrow(2, 4, 4)[0],
        lambda t: t.unsqueeze(-1)[5:7].squeeze(-1),
        lambda t: t.unsqueeze(1)[-1][0],
        lambda t: t[-1],
        lambda t: t.unsqueeze(0).unbind()[0].narrow(0, 4, 4),
        lambda t: t.unbind(1)[3],
        lambda t: t.chunk(3)[2],
        lambda t: t.chunk(2, dim=1)[1].unsqueeze(0)[0, 4:6],
        lambda t: t.split(5)[6],
        lambda t: t[3:7].split([6, 10], dim=-1)[1],
        lambda t: t[:, 2:10].split([6, 2], dim=-1)[1],
        lambda t: t[3:7][2][1:4],
        lambda t: t[:, 3],
        lambda t: t[0, 3],
        lambda t: t[3:7, 2:5].t(),
    ],
)
def test_it_does_what_a_tensor_does(checkpoint: Checkpoint, stored: dict[str, Tensor], use: object) -> None:
    assert callable(use)
    tensor = dict(LazyStream(checkpoint, CPU))["embed.weight"]
    found, expected = use(tensor), use(stored["embed.weight"])
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert torch.equal(found + 0, expected)


def test_an_index_that_is_not_there_is_an_error(checkpoint: Checkpoint) -> None:
    tensor = dict(LazyStream(checkpoint, CPU))["embed.weight"]
    for index in (32, -33):
        with pytest.raises(IndexError):
            tensor[index]
    with pytest.raises(RuntimeError, match="sum exactly to 32"):
        tensor.split([3, 4])


def test_experts_of_one_tensor_are_read_one_by_one(tmp_path: Path) -> None:
    whole = torch.arange(4 * 6 * 8, dtype=torch.float32).view(4, 6, 8)
    save_file({"experts": whole}, tmp_path / "model.safetensors")
    stream = LazyStream(Checkpoint.open(tmp_path), CPU)
    [(_, tensor)] = stream
    assert torch.equal(tensor[2].t()[:, 3:6] + 0, whole[2].t()[:, 3:6])
    assert stream.read_bytes == whole[2].nbytes


def test_a_number_is_read_out(checkpoint: Checkpoint, stored: dict[str, Tensor]) -> None:
    tensors = dict(LazyStream(checkpoint, CPU))
    assert tensors["scale"].item() == stored["scale"].item()
    target = torch.zeros(16)
    torch.nn.Parameter(target, requires_grad=False).data.copy_(tensors["norm.weight"])
    assert torch.equal(target, stored["norm.weight"])


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_cuts(checkpoint: Checkpoint, stored: dict[str, Tensor], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["layers.0.column.weight", "layers.1.row.weight"]))
    tensor = dict(LazyStream(checkpoint, CPU))[name]
    whole = stored[name]
    for _ in range(data.draw(st.integers(1, 3))):
        dim = data.draw(st.integers(-2, 1))
        begin = data.draw(st.integers(-whole.shape[dim] - 1, whole.shape[dim] + 1))
        end = data.draw(st.one_of(st.none(), st.integers(-whole.shape[dim] - 1, whole.shape[dim] + 1)))
        cut = (slice(begin, end), slice(None)) if dim % 2 == 0 else (slice(None), slice(begin, end))
        tensor, whole = tensor[cut], whole[cut]
    assert tensor.shape == whole.shape
    assert torch.equal(tensor + 0, whole)


def test_what_can_not_be_read_is_known_before_any_is_handed_out(stored: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    stream = LazyStream(Checkpoint.open(tmp_path), CPU)
    stream.prove()
    assert stream.read_bytes == stored["scale"].nbytes
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        stream.prove()


def test_a_file_that_became_shorter_is_said_when_it_is_used(stored: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    stream = iter(LazyStream(Checkpoint.open(tmp_path), CPU))
    next(stream)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _ = {name: kept(name, tensor, 0) for name, tensor in stream}
