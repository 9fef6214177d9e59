"""Which layers stay and how many slots there are, against a plain statement of what is wanted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import zeros

from mball.loader.checkpoint import Checkpoint
from mball.swap.layers_plan import (
    LEAST_SLOTS,
    MOST_SLOTS,
    Layout,
    Rates,
    Sizes,
    cells_for,
    layout,
    sizes_of,
    spread,
    step_s,
)

LAYERS = st.integers(1, 90)
RATES = st.builds(Rates, *[st.floats(1e-5, 1.0)] * 2, st.floats(0, 1.0))


@given(LAYERS, st.data())
def test_the_streamed_layers_are_apart_by_as_near_the_same_as_can_be(num_layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_layers))
    streamed = spread(num_layers, count)
    assert sorted(set(streamed)) == list(streamed)
    assert all(0 <= layer < num_layers for layer in streamed)
    around = [*streamed, streamed[0] + num_layers]
    gaps = [second - first for first, second in pairwise(around)]
    assert max(gaps) - min(gaps) <= 1


@given(LAYERS, st.data())
def test_every_cell_is_used_and_no_more(num_layers: int, data: st.DataObject) -> None:
    cells = data.draw(st.integers(min(LEAST_SLOTS, num_layers), num_layers + 3))
    chosen = layout(num_layers, cells, data.draw(st.none() | RATES))
    if cells >= num_layers:
        assert chosen == Layout(num_layers, (), 0)
        return
    assert LEAST_SLOTS <= chosen.slots <= MOST_SLOTS
    assert len(chosen.resident) + chosen.slots == cells
    assert len(chosen.streamed) > chosen.slots, "a streamed layer that has a slot of its own is no streamed layer"
    assert sorted((*chosen.resident, *chosen.streamed)) == list(range(num_layers))


def test_too_few_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="2 at least"):
        layout(5, 1)


@given(st.integers(3, 60), RATES, st.data())
def test_no_other_number_of_slots_is_better_by_more_than_the_gain(
    num_layers: int, rates: Rates, data: st.DataObject
) -> None:
    cells = data.draw(st.integers(LEAST_SLOTS, num_layers - 1))
    chosen = step_s(layout(num_layers, cells, rates), rates)
    for slots in range(LEAST_SLOTS, min(MOST_SLOTS, cells) + 1):
        streamed = spread(num_layers, num_layers - cells + slots)
        assert chosen <= step_s(Layout(num_layers, streamed, slots), rates) / 0.98 + 1e-9


@given(st.integers(3, 60), RATES, st.data())
def test_a_step_takes_neither_less_than_its_parts_nor_more_than_their_sum(
    num_layers: int, rates: Rates, data: st.DataObject
) -> None:
    chosen = layout(num_layers, data.draw(st.integers(LEAST_SLOTS, num_layers - 1)), rates)
    copies, computing = len(chosen.streamed) * rates.copy_s, num_layers * rates.compute_s + rates.idle_s
    took = step_s(chosen, rates)
    assert max(copies, computing) * (1 - 1e-6) <= took <= (copies + computing) * (1 + 1e-6)


def test_an_h100_s_8b_hides_its_computing_behind_the_bus() -> None:
    # 416 MiB a layer at 50 GiB/s, a fifth of a millisecond of computing, three between two steps.
    rates = Rates(0.0081, 0.0002, 0.003)
    chosen = layout(32, 18, rates)
    assert chosen.slots == LEAST_SLOTS
    assert step_s(chosen, rates) == pytest.approx(16 * 0.0081, rel=0.01)


def test_a_third_slot_is_taken_where_it_is_worth_the_resident_layer_that_it_costs() -> None:
    rates = Rates(0.0157, 0.0139, 0.0006)
    assert layout(27, 6, rates).slots == 3
    assert step_s(layout(27, 6, rates), rates) < 0.95 * step_s(layout(27, 6), rates)


@given(LAYERS, st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 100_000), st.integers(0, 5000))
def test_auto_takes_what_fits(num_layers: int, rest: int, cell: int, limit: int, beside: int) -> None:
    sizes = Sizes(num_layers, rest, cell, rest + num_layers * cell)
    cells = cells_for("auto", sizes, limit_bytes=limit, beside_bytes=beside)
    least = min(LEAST_SLOTS, num_layers)
    assert least <= cells <= num_layers
    fits = [c for c in range(least, num_layers + 1) if sizes.held_bytes(c) * 9 / 8 + beside <= limit]
    assert abs(cells - max(fits, default=least)) <= 1
    if cells > least:
        assert sizes.held_bytes(cells) * 9 // 8 + beside <= limit


@given(LAYERS, st.integers(0, 100))
def test_a_number_of_layers_stays_and_slots_come_beside(num_layers: int, wish: int) -> None:
    cells = cells_for(wish, Sizes(num_layers, 0, 1, 0))
    assert cells == min(num_layers, wish + LEAST_SLOTS)
    assert len(layout(num_layers, cells).resident) >= min(wish, num_layers)


def test_sizes_are_told_by_the_names_and_the_largest_list_is_the_decoder_s(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.{part}.weight": zeros(100, 100) for n in range(3) for part in ("a", "b")}
    tensors |= {f"vision.layers.{n}.weight": zeros(10) for n in range(3)}
    tensors |= {"model.embed.weight": zeros(500), "model.layers.7.weight": zeros(500)}
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = sizes_of(Checkpoint.open(tmp_path), 3, 2)
    assert sizes.cell_bytes == -(-2 * 20_032 // 4096) * 4096
    assert sizes.rest_bytes == 4096
    assert sizes.whole_bytes == 2 * (3 * 20_000 + 30 + 1000)
    assert sizes.held_bytes(2) == sizes.rest_bytes + 2 * sizes.cell_bytes
