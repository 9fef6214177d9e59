from __future__ import annotations

import itertools

import pytest

from mball.errors import IllegalMove
from mball.memory.states import MOVES, Process, State, Weights

GONE, STARTING, ALIVE, STOPPING, FAILED = Process
DEVICE, DRAM, NVME, SOURCE = Weights
EVERY = [State(process, weights) for process, weights in itertools.product(Process, Weights)]

LEGAL = {
    ("start", GONE, DRAM, STARTING, DRAM),
    ("start", GONE, SOURCE, STARTING, SOURCE),
    ("start", GONE, NVME, STARTING, NVME),
    ("started", STARTING, DRAM, ALIVE, DRAM),
    ("started", STARTING, SOURCE, ALIVE, SOURCE),
    ("started", STARTING, NVME, ALIVE, NVME),
    ("promote", ALIVE, DRAM, ALIVE, DEVICE),
    ("promote", ALIVE, SOURCE, ALIVE, DEVICE),
    ("promote", ALIVE, NVME, ALIVE, DEVICE),
    ("demote", ALIVE, DEVICE, ALIVE, DRAM),
    ("demote", ALIVE, DEVICE, ALIVE, SOURCE),
    ("demote", ALIVE, DEVICE, ALIVE, NVME),
    ("stop", STARTING, DRAM, STOPPING, DRAM),
    ("stop", STARTING, SOURCE, STOPPING, SOURCE),
    ("stop", STARTING, NVME, STOPPING, NVME),
    ("stop", ALIVE, DRAM, STOPPING, DRAM),
    ("stop", ALIVE, SOURCE, STOPPING, SOURCE),
    ("stop", ALIVE, NVME, STOPPING, NVME),
    ("stop", ALIVE, DEVICE, STOPPING, DEVICE),
    ("exited", STOPPING, DRAM, GONE, DRAM),
    ("exited", STOPPING, SOURCE, GONE, SOURCE),
    ("exited", STOPPING, NVME, GONE, NVME),
    ("exited", STOPPING, DEVICE, GONE, DRAM),
    ("exited", STOPPING, DEVICE, GONE, SOURCE),
    ("exited", STOPPING, DEVICE, GONE, NVME),
    ("died", STARTING, DRAM, GONE, DRAM),
    ("died", STARTING, SOURCE, GONE, SOURCE),
    ("died", STARTING, NVME, GONE, NVME),
    ("died", ALIVE, DRAM, GONE, DRAM),
    ("died", ALIVE, SOURCE, GONE, SOURCE),
    ("died", ALIVE, NVME, GONE, NVME),
    ("died", ALIVE, DEVICE, GONE, DRAM),
    ("died", ALIVE, DEVICE, GONE, SOURCE),
    ("died", ALIVE, DEVICE, GONE, NVME),
    ("fail", GONE, DRAM, FAILED, DRAM),
    ("fail", GONE, SOURCE, FAILED, SOURCE),
    ("fail", GONE, NVME, FAILED, NVME),
    ("retry", FAILED, DRAM, GONE, DRAM),
    ("retry", FAILED, SOURCE, GONE, SOURCE),
    ("retry", FAILED, NVME, GONE, NVME),
} | {
    move
    for process in Process
    for move in (
        ("image ready", process, SOURCE, process, DRAM),
        ("image ready", process, NVME, process, DRAM),
        ("image dropped", process, DRAM, process, SOURCE),
        ("image dropped", process, DRAM, process, NVME),
        ("found in the swap store", process, SOURCE, process, NVME),
        ("gone from the swap store", process, NVME, process, SOURCE),
    )
}


def test_the_table_is_these_moves_and_no_others() -> None:
    table = {(name, a.process, a.weights, b.process, b.weights) for (a, b), name in MOVES.items()}
    assert table == LEGAL


@pytest.mark.parametrize("before", EVERY, ids=str)
@pytest.mark.parametrize("after", EVERY, ids=str)
def test_a_move_is_made_where_it_is_legal_and_refused_where_not(before: State, after: State) -> None:
    if (before, after) in MOVES:
        assert before.to(after.process, after.weights) == after
    else:
        with pytest.raises(IllegalMove, match=f"{before} to {after}"):
            before.to(after.process, after.weights)


def test_weights_on_the_device_belong_to_a_live_process() -> None:
    reached = {State()}
    while further := {after for before, after in MOVES if before in reached} - reached:
        reached |= further
    assert {state.process for state in reached if state.weights is DEVICE} == {ALIVE, STOPPING}
    assert {state.process for state in reached} == set(Process)


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (State(ALIVE, DEVICE), "device"),
        (State(ALIVE, DRAM), "dram"),
        (State(GONE, DRAM), "dram"),
        (State(ALIVE, NVME), "nvme"),
        (State(GONE, NVME), "nvme"),
        (State(ALIVE, SOURCE), "source"),
        (State(GONE, SOURCE), "stopped"),
        (State(STARTING, DRAM), "starting"),
        (State(STOPPING, DEVICE), "stopping"),
        (State(FAILED, SOURCE), "failed"),
    ],
)
def test_what_people_see(state: State, shown: str) -> None:
    assert state.shown_as == shown
