"""Which layers vLLM is to have in host memory."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mball.memory.vllm_cold import Cold, fitting, staying
from mball.swap.layers_plan import Sizes

LAYERS = st.integers(1, 48)


def sizes(num_layers: int) -> Sizes:
    return Sizes(num_layers, 50, 10, 50 + 10 * num_layers)


def cold_of(way: Cold) -> list[int]:
    """As vLLM chooses them."""
    return [at for at in range(way.num_layers) if at % way.group_size >= way.group_size - way.num_in_group]


def waits(way: Cold) -> bool:
    """Whether neighbours have one buffer."""
    cold = cold_of(way)
    return way.prefetch_step == 1 and any(after - before == 1 for before, after in itertools.pairwise(cold))


@given(num_layers=LAYERS, resident=st.integers(0, 60))
def test_as_many_stay_as_were_asked_for_or_a_few_less(num_layers: int, resident: int) -> None:
    way = staying(num_layers, resident)
    if resident >= num_layers or num_layers < 2:
        assert way is None
        return
    assert way is not None
    assert len(cold_of(way)) == way.count
    assert max(2, num_layers - resident) <= way.count
    assert way.count <= num_layers - resident + 6, "groups are not that coarse"
    assert num_layers < 4 or not resident or not waits(way)


@given(num_layers=LAYERS, resident=st.integers(0, 48))
def test_no_buffer_is_filled_with_another_layer_before_its_own_is_computed(num_layers: int, resident: int) -> None:
    """As vLLM 0.26 fills them: the next one's buffer once a layer has been computed, whichever buffer that is."""
    if (way := staying(num_layers, resident)) is None:
        return
    buffers = {number % way.prefetch_step: number for number in range(way.prefetch_step)}
    for _ in range(3):
        for number in range(way.count):
            assert buffers[number % way.prefetch_step] == number
            following = (number + way.prefetch_step) % way.count
            buffers[following % way.prefetch_step] = following


@given(num_layers=st.integers(2, 48), room=st.integers(0, 600))
def test_what_fits_is_what_is_chosen(num_layers: int, room: int) -> None:
    model = sizes(num_layers)
    way = fitting(model, room)
    if way is None:
        assert model.whole_bytes <= room
        return
    assert model.whole_bytes > room
    assert way.held_bytes(model) < model.whole_bytes
    if way.held_bytes(model) <= room and waits(way):
        return
    fewer = [other for n in range(num_layers) if (other := staying(num_layers, n)) and other.count < way.count]
    assert not any(other.held_bytes(model) <= room for other in fewer if not waits(other))
    if way.held_bytes(model) > room:
        assert (way.count, way.prefetch_step) == (num_layers, 1), "it can't be smaller"


def test_by_hand() -> None:
    assert staying(32, 20) == Cold(32, 12, 5, 2, 2)
    assert staying(32, 16) == Cold(32, 16, 2, 1, 1)
    assert staying(32, 31) == Cold(32, 2, 11, 1, 1), "one alone would pass through its own room"
    assert staying(32, 0) == Cold(32, 32, 1, 1, 2)
    assert staying(2, 0) == Cold(2, 2, 1, 1, 1)
    assert staying(1, 0) is None
    assert Cold(32, 12, 5, 2, 2).options() == {
        "offload_group_size": 5,
        "offload_num_in_group": 2,
        "offload_prefetch_step": 2,
    }
    assert fitting(sizes(32), 370) is None
    assert fitting(sizes(32), 270) == Cold(32, 12, 5, 2, 2)
