"""Layers that pass through fewer cells than there are layers: whatever happens, each computes with its own weights."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mball.device.account import Account, OpenAccount
from mball.errors import Cancelled, DeviceOutOfMemory, ReadError, TransitionError
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.swap.layers import LayeredWeights
from mball.swap.layers_copy import Fetch, HostCopier, Parts
from mball.swap.layers_plan import layout
from tests.device.test_vmm import resident_bytes
from tests.server.engine.test_engine_life import SmallDevice

NUM = 7
WIDTH = 48


class Layer(nn.Module):
    """Gives back its number, if its weights are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.empty(WIDTH))
        self.register_buffer("kept", torch.empty(3, device="meta"))

    def forward(self, _: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.weight.clone(), self.scale.clone(), self.kept.clone()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(WIDTH, 5))
        self.layers = nn.ModuleList(Layer() for _ in range(NUM))

    def step(self, stop_before: int = NUM) -> None:
        for number, layer in enumerate(self.layers):
            if number == stop_before:
                raise RuntimeError("the step is cut")
            for found, wanted in zip(layer(None), tensors_of(number).values(), strict=True):
                assert torch.equal(found, wanted), f"layer {number} has another's weights"


def tensors_of(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    shapes = {"inner.weight": (WIDTH, WIDTH), "scale": (WIDTH,), "kept": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    written: dict[str, Tensor] = {"embed": torch.ones(WIDTH, 5)}
    for number in range(NUM):
        written |= {f"layers.{number}.{name}": tensor for name, tensor in tensors_of(number).items()}
    save_file(written, folder / "model.safetensors")
    return folder


def bound(path: Path, cells: int, account: Account | None = None, **options: Any) -> tuple[Toy, LayeredWeights]:
    with torch.device("meta"):
        toy = Toy()
    device = torch.device("cpu")
    checkpoint = Checkpoint.open(path)
    return toy, LayeredWeights.bind(
        toy, list(toy.layers), checkpoint, cells=cells, device=device, account=account, threads=3, **options
    )


@pytest.fixture
def image_fd(path: Path) -> Iterator[int]:
    checkpoint = Checkpoint.open(path)
    fd = image.create("toy", checkpoint.image_bytes)
    image.fill(checkpoint, fd)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("cells", [2, 3, 5, 6, 7])
def test_each_layer_has_its_own_weights_in_every_step(path: Path, cells: int) -> None:
    toy, weights = bound(path, cells)
    assert weights.load().bytes < Checkpoint.open(path).nbytes or cells == NUM
    assert torch.equal(toy.embed, torch.ones(WIDTH, 5))
    for _ in range(25):
        toy.step()
    assert len(weights.layout.resident) + weights.layout.slots == cells
    weights.close()


CHANGES = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("cut"), st.integers(0, NUM - 1)),
    st.tuples(st.just("cells"), st.integers(2, NUM)),
    st.tuples(st.just("image"), st.integers(0, 1)),
    st.tuples(st.just("away"), st.integers(2, NUM)),
    st.tuples(st.just("measure"), st.integers(10, 12)),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CHANGES, max_size=12), st.integers(2, NUM))
def test_whatever_happens_between_two_steps(
    path: Path, image_fd: int, changes: list[tuple[str, int]], first: int
) -> None:
    device = SmallDevice(1 << 40)
    toy, weights = bound(path, NUM, device)
    weights.resize(first)
    source: int | None = None
    weights.load(source)
    for change, number in changes:
        match change:
            case "step" | "measure":
                for _ in range(number):
                    toy.step()
            case "cut":
                with pytest.raises(RuntimeError, match="is cut"):
                    toy.step(stop_before=number)
            case "cells":
                weights.resize(number)
            case "image":
                source = image_fd if number else None
                weights.use_image(source)
            case "away":
                assert weights.release() > 0
                assert device.taken_bytes == 0
                weights.resize(number)
                weights.load(source)
        assert device.taken_bytes == weights.nbytes == weights.bytes_of(weights.cells)
    toy.step()
    toy.step()
    weights.close()
    assert device.taken_bytes == 0


def test_cells_that_go_are_given_back_to_the_device(path: Path) -> None:
    toy, weights = bound(path, NUM)
    weights.load()
    held = weights._cells
    address, whole = held.memory().data_ptr(), weights.nbytes
    assert resident_bytes(address, whole) == whole
    for cells in (5, 2, 4, NUM, 3):
        weights.resize(cells)
        toy.step()
        assert resident_bytes(address, whole) == weights.nbytes == held.bytes_of(cells)
    assert weights.release() == held.bytes_of(3)
    assert resident_bytes(address, whole) == 0


def test_a_change_that_the_device_refuses_changes_nothing(path: Path) -> None:
    device = SmallDevice(1 << 40)
    toy, weights = bound(path, NUM, device)
    weights.load()
    weights.resize(3)
    device.total_bytes = device.taken_bytes
    before = weights.layout
    with pytest.raises(DeviceOutOfMemory):
        weights.resize(5)
    assert (weights.cells, weights.layout) == (3, before)
    with pytest.raises(TransitionError, match="2 to 7"):
        weights.resize(1)
    toy.step()
    weights.close()


def test_tensors_are_cast_on_the_way(path: Path) -> None:
    toy, weights = bound(path, 3, dtype=torch.bfloat16)
    weights.load()
    for _ in range(3):
        for number, layer in enumerate(toy.layers):
            for found, wanted in zip(layer(None), tensors_of(number).values(), strict=True):
                assert torch.equal(found, wanted.bfloat16())
    weights.close()


def test_a_layer_that_cannot_be_read_fails_its_step_and_the_next_one_tries_again(tmp_path: Path, path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = (path / "model.safetensors").read_bytes()
    file.write_bytes(content)
    toy, weights = bound(tmp_path, 5)
    weights.resize(3)
    weights.load()
    toy.step()
    os.truncate(file, len(content) // 3)
    toy.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with pytest.raises(ReadError, match="shrank"):
        toy.step()
    with pytest.raises(ReadError, match="shrank"):
        toy.step()
    weights.resize(5)
    with pytest.raises(ReadError, match="shrank"):
        toy.step()
    file.write_bytes(content)
    for _ in range(3):
        toy.step()
    weights.close()


class Gated(HostCopier):
    """Reads begin once the gate is open."""

    gate = threading.Event()

    def fetch(self, parts: Parts, cell: Tensor, after: Any) -> Fetch:
        held = self._readers._pool.submit(self._wait)
        fetch = super().fetch(parts, cell, after)
        assert held is not None
        return fetch

    def _wait(self) -> None:
        while not self.gate.wait(0.01) and not self._readers._cancel.is_set():
            pass


def test_a_step_that_waits_for_a_layer_ends_soon_when_it_is_cancelled(path: Path) -> None:
    toy, weights = bound(path, 3)
    weights._copier_for = lambda fd: Gated(Checkpoint.open(path), fd, 1)
    Gated.gate.clear()
    weights.load()
    threading.Timer(0.3, weights.cancel).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        toy.step()
    weights.close()
    assert time.monotonic() - began < 30


def test_computing_waits_for_a_late_layer(path: Path) -> None:
    toy, weights = bound(path, 3)
    weights._copier_for = lambda fd: Gated(Checkpoint.open(path), fd, 1)
    Gated.gate.clear()
    weights.load()
    threading.Timer(0.3, Gated.gate.set).start()
    began = time.monotonic()
    toy.step()
    assert time.monotonic() - began > 0.25
    weights.close()


def test_nothing_is_streamed_while_the_weights_are_away(path: Path) -> None:
    toy, weights = bound(path, 3)
    with pytest.raises(TransitionError, match="not on the device"):
        toy.layers[0](None)
    weights.use_image(None)
    assert weights.release() == 0
    weights.close()


def test_slots_are_chosen_anew_once_steps_were_measured(path: Path) -> None:
    toy, weights = bound(path, 5)
    weights.load()
    assert weights.layout.slots == 2
    for _ in range(12):
        toy.step()
        time.sleep(0.003)
    rates = weights._layer_stream._watch.rates
    assert rates is not None
    assert rates.idle_s > 0.002
    assert weights.layout == layout(NUM, 5, rates)
    weights.close()


def test_neither_threads_nor_descriptors_are_left_behind(path: Path, image_fd: int) -> None:
    toy, weights = bound(path, 3)
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for source in (image_fd, None, image_fd, None):
        weights.load(source)
        toy.step()
        weights.use_image(None if source else image_fd)
        toy.step()
        weights.use_image(source)
        weights.release()
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before
    weights.close()


def test_the_account_is_open_by_default(path: Path) -> None:
    _, weights = bound(path, 2, OpenAccount())
    assert weights.least_cells == 2
    weights.load()
    weights.close()
