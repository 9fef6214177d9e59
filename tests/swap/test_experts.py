"""Experts that pass through fewer cells than there are experts: whoever is chosen computes with its own weights."""

from __future__ import annotations

import os
import random
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

from mball.device.account import Account
from mball.errors import Cancelled, DeviceOutOfMemory, ReadError, TransitionError
from mball.loader import image
from mball.loader.binding import Piece
from mball.loader.checkpoint import Checkpoint
from mball.swap.experts import ExpertWeights
from mball.swap.layers_plan import expert_sizes_of
from tests.server.engine.test_engine_life import SmallDevice
from tests.swap.test_layers import Gated

LAYERS, EXPERTS, WIDTH = 3, 5, 24
SHAPES = {"gate_proj": (WIDTH, WIDTH), "up_proj": (WIDTH, WIDTH), "down_proj": (WIDTH, 2 * WIDTH)}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, WIDTH, 2 * WIDTH))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(WIDTH, 7))
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": Experts()}) for _ in range(LAYERS))


def tensor_of(layer: int, expert: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * layer + 10 * expert + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def name_of(layer: int, expert: int, name: str) -> str:
    return f"layers.{layer}.experts.{expert}.{name}.weight"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor an expert, as most checkpoints have them; of the last layer one of all experts."""
    folder = tmp_path_factory.mktemp("toy")
    written: dict[str, Tensor] = {"embed": torch.ones(WIDTH, 7)}
    for layer in range(LAYERS - 1):
        for expert in range(EXPERTS):
            written |= {name_of(layer, expert, name): tensor_of(layer, expert, name) for name in SHAPES}
    for leaf in ("gate_up_proj", "down_proj"):
        stacked = torch.stack([whole_of(LAYERS - 1, expert)[leaf] for expert in range(EXPERTS)])
        written[f"layers.{LAYERS - 1}.experts.{leaf}"] = stacked
    save_file(written, folder / "model.safetensors")
    return folder


def whole_of(layer: int, expert: int) -> dict[str, Tensor]:
    gate, up, down = (tensor_of(layer, expert, name) for name in SHAPES)
    return {"gate_up_proj": torch.cat([gate, up]), "down_proj": down}


def sources(item_bytes: int) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    one = WIDTH * WIDTH * item_bytes
    for layer in range(LAYERS - 1):
        prefix = f"layers.{layer}.experts"
        found[f"{prefix}.gate_up_proj"] = [
            Piece(name_of(layer, expert, name), (2 * expert + half) * one)
            for expert in range(EXPERTS)
            for half, name in enumerate(("gate_proj", "up_proj"))
        ]
        found[f"{prefix}.down_proj"] = [
            Piece(name_of(layer, expert, "down_proj"), expert * 2 * one) for expert in range(EXPERTS)
        ]
    return found


def bound(path: Path, cells: int, account: Account | None = None, **options: Any) -> tuple[Toy, ExpertWeights]:
    with torch.device("meta"):
        toy = Toy()
    dtype = options.get("dtype") or torch.float32
    modules = [layer["experts"] for layer in toy.layers]
    weights = ExpertWeights.bind(
        toy,
        modules,
        Checkpoint.open(path),
        cells=cells,
        device=torch.device("cpu"),
        sources=sources(dtype.itemsize),
        account=account,
        threads=3,
        **options,
    )
    return toy, weights


def step(
    weights: ExpertWeights, chooser: random.Random, *, stop_in: int = LAYERS, dtype: torch.dtype = torch.float32
) -> None:
    for layer in range(LAYERS):
        chosen = sorted(chooser.sample(range(EXPERTS), chooser.randint(1, EXPERTS)))
        seen = []
        for expert in weights.turn(layer, dict.fromkeys(chosen, 0.5)):
            if layer == stop_in:
                raise RuntimeError("the step is cut")
            for leaf, wanted in whole_of(layer, expert.number).items():
                assert torch.equal(expert.tensors[leaf], wanted.to(dtype)), f"{expert.number} has another's {leaf}"
            seen.append(expert.number)
        assert sorted(seen) == chosen
    under_way = weights._expert_stream._fetches
    assert all(expert < EXPERTS for expert in under_way), "only the next layer's, the first one's, are under way"


@pytest.fixture
def image_fd(path: Path) -> Iterator[int]:
    checkpoint = Checkpoint.open(path)
    fd = image.create("toy", checkpoint.image_bytes)
    image.fill(checkpoint, fd)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("cells", [2, 3, 7, 14, 15, 99])
def test_each_expert_has_its_own_weights_whatever_is_chosen(path: Path, cells: int) -> None:
    toy, weights = bound(path, cells)
    weights.load()
    assert torch.equal(toy.embed, torch.ones(WIDTH, 7))
    chooser = random.Random(cells)
    for _ in range(40):
        step(weights, chooser)
    assert weights.cells == min(cells, LAYERS * EXPERTS) == weights.max_cells
    assert (weights.misses == 0) == (cells >= LAYERS * EXPERTS)
    assert weights.nbytes == weights.bytes_of(weights.cells)
    weights.close()


CHANGES = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("cut"), st.integers(0, LAYERS - 1)),
    st.tuples(st.just("cells"), st.integers(2, 12)),
    st.tuples(st.just("image"), st.integers(0, 1)),
    st.tuples(st.just("away"), st.integers(2, 12)),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CHANGES, max_size=12), st.integers(2, 12), st.integers(0, 99))
def test_whatever_happens_between_two_steps(
    path: Path, image_fd: int, changes: list[tuple[str, int]], first: int, seed: int
) -> None:
    device, chooser = SmallDevice(1 << 40), random.Random(seed)
    _, weights = bound(path, 12, device)
    weights.resize(first)
    source: int | None = None
    weights.load(source)
    for change, number in changes:
        match change:
            case "step":
                for _ in range(number):
                    step(weights, chooser)
            case "cut":
                with pytest.raises(RuntimeError, match="is cut"):
                    step(weights, chooser, stop_in=number)
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
    step(weights, chooser)
    step(weights, chooser)
    weights.close()
    assert device.taken_bytes == 0


def test_experts_that_are_chosen_most_stay(path: Path) -> None:
    """And come back ahead of their layer's turn when a rare one took their place."""
    _, weights = bound(path, 6)
    weights.load()
    hot, cold = {1: 1.0, 3: 1.0}, {0: 0.5, 2: 0.5, 4: 0.5}

    def run(shares: dict[int, float]) -> int:
        before = weights.misses
        for layer in range(LAYERS):
            list(weights.turn(layer, shares))
        return weights.misses - before

    for _ in range(10):
        run(hot)
    assert run(hot) == 0
    assert run(cold) == 9
    # Three cells of the first layer's own turn: its hot ones come at its turn, the others' were fetched ahead.
    assert run(hot) <= 2
    assert run(hot) == 0
    weights.release()
    weights.load()
    assert run(hot) == 0, "what was worth most is there from the start"
    weights.close()


def test_tensors_are_cast_on_the_way(path: Path) -> None:
    _, weights = bound(path, 4, dtype=torch.bfloat16)
    weights.load()
    for _ in range(4):
        step(weights, random.Random(2), dtype=torch.bfloat16)
    weights.close()


def test_a_change_that_the_device_refuses_changes_nothing(path: Path) -> None:
    device = SmallDevice(1 << 40)
    _, weights = bound(path, 12, device)
    weights.load()
    weights.resize(3)
    device.total_bytes = device.taken_bytes
    with pytest.raises(DeviceOutOfMemory):
        weights.resize(9)
    assert weights.cells == 3
    with pytest.raises(TransitionError, match="2 to 12"):
        weights.resize(1)
    step(weights, random.Random(3))
    weights.close()


def test_an_expert_that_cannot_be_read_fails_its_step_and_the_next_one_tries_again(tmp_path: Path, path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = (path / "model.safetensors").read_bytes()
    file.write_bytes(content)
    _, weights = bound(tmp_path, 4)
    weights.load()
    step(weights, random.Random(4))
    os.truncate(file, len(content) // 3)
    for _ in range(2):
        with pytest.raises(ReadError, match="shrank"):
            step(weights, random.Random(5))
    file.write_bytes(content)
    for seed in (5, 6, 7):
        step(weights, random.Random(seed))
    weights.resize(3)
    step(weights, random.Random(3))
    weights.close()


def test_a_step_that_waits_for_an_expert_ends_soon_when_it_is_cancelled(path: Path) -> None:
    _, weights = bound(path, 3)
    weights._copier_for = lambda fd: Gated(Checkpoint.open(path), fd, 1)
    Gated.gate.clear()
    weights.load()
    threading.Timer(0.3, weights.cancel).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        step(weights, random.Random(6))
    weights.close()
    assert time.monotonic() - began < 30


def test_computing_waits_for_a_late_expert(path: Path) -> None:
    _, weights = bound(path, 3)
    weights._copier_for = lambda fd: Gated(Checkpoint.open(path), fd, 1)
    Gated.gate.clear()
    weights.load()
    threading.Timer(0.3, Gated.gate.set).start()
    began = time.monotonic()
    step(weights, random.Random(7))
    assert time.monotonic() - began > 0.25
    weights.close()


def test_nothing_is_streamed_while_the_weights_are_away(path: Path) -> None:
    _, weights = bound(path, 3)
    with pytest.raises(TransitionError, match="not on the device"):
        list(weights.turn(0, {0: 1.0}))
    weights.use_image(None)
    assert weights.release() == 0
    weights.close()


def test_neither_threads_nor_descriptors_are_left_behind(path: Path, image_fd: int) -> None:
    _, weights = bound(path, 3)
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for source in (image_fd, None, image_fd):
        weights.load(source)
        step(weights, random.Random(8))
        weights.use_image(None if source else image_fd)
        step(weights, random.Random(9))
        weights.release()
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before
    weights.close()


def test_sizes_are_known_from_the_names_alone(path: Path) -> None:
    sizes = expert_sizes_of(Checkpoint.open(path), LAYERS, 4)
    _, weights = bound(path, 2)
    assert sizes.count == LAYERS * EXPERTS == weights.num_experts
    assert sizes.held_bytes(2) == weights.bytes_of(2)
    with pytest.raises(ValueError, match="no experts"):
        expert_sizes_of(Checkpoint.open(path), 0, 4)
    weights.close()
