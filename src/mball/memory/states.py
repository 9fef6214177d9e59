"""The states of a model and the moves between them: a pair of its process and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mball.errors import IllegalMove


class Process(StrEnum):
    """A worker's process. `failed` is gone and not to be started before a cool-down."""

    GONE = "gone"
    STARTING = "starting"
    ALIVE = "alive"
    STOPPING = "stopping"
    FAILED = "failed"


class Weights(StrEnum):
    """The highest rung that holds a model's weights."""

    DEVICE = "device"
    DRAM = "dram"
    NVME = "nvme"
    SOURCE = "source"


@dataclass(frozen=True, slots=True)
class State:
    process: Process = Process.GONE
    weights: Weights = Weights.SOURCE

    def __str__(self) -> str:
        return f"{self.process}/{self.weights}"

    @property
    def shown_as(self) -> str:
        """One word for people: device, dram, nvme, source, stopped, starting, stopping or failed."""
        kept = self.weights in (Weights.DRAM, Weights.NVME)
        if self.process is Process.ALIVE or (self.process is Process.GONE and kept):
            return self.weights.value
        return "stopped" if self.process is Process.GONE else self.process.value

    def to(self, process: Process | None = None, weights: Weights | None = None) -> State:
        """The state after a legal move. Raises IllegalMove for any other."""
        after = State(process or self.process, weights or self.weights)
        if (self, after) not in MOVES:
            raise IllegalMove(f"no move leads from {self} to {after}")
        return after


_RESTS = (Weights.DRAM, Weights.NVME, Weights.SOURCE)


def _moves() -> dict[tuple[State, State], str]:
    gone, starting, alive, stopping, failed = Process
    moves: dict[tuple[State, State], str] = {}
    for rest in _RESTS:
        moves |= {
            (State(gone, rest), State(starting, rest)): "start",
            (State(starting, rest), State(alive, rest)): "started",
            (State(alive, rest), State(alive, Weights.DEVICE)): "promote",
            (State(alive, Weights.DEVICE), State(alive, rest)): "demote",
            (State(starting, rest), State(stopping, rest)): "stop",
            (State(alive, rest), State(stopping, rest)): "stop",
            (State(stopping, rest), State(gone, rest)): "exited",
            (State(stopping, Weights.DEVICE), State(gone, rest)): "exited",
            (State(starting, rest), State(gone, rest)): "died",
            (State(alive, rest), State(gone, rest)): "died",
            (State(alive, Weights.DEVICE), State(gone, rest)): "died",
            (State(gone, rest), State(failed, rest)): "fail",
            (State(failed, rest), State(gone, rest)): "retry",
        }
    moves[State(alive, Weights.DEVICE), State(stopping, Weights.DEVICE)] = "stop"
    for process in Process:
        for below in (Weights.NVME, Weights.SOURCE):
            moves[State(process, below), State(process, Weights.DRAM)] = "image ready"
            moves[State(process, Weights.DRAM), State(process, below)] = "image dropped"
        moves[State(process, Weights.SOURCE), State(process, Weights.NVME)] = "found in the swap store"
        moves[State(process, Weights.NVME), State(process, Weights.SOURCE)] = "gone from the swap store"
    return moves


MOVES = _moves()
"""Every legal move, (from, to) → its name. Weights on the device belong to a process that is alive or stopping."""
