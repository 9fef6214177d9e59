"""What the policy sees of a device, and what it decides: the words between it and whoever carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mball.memory.planner import Candidate, Move
from mball.memory.states import Process


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one model stands: what the planner sees of it, and what waits for it.

    `settled`: nothing moves it; `arriving`: the transition under way brings it in. `queued` requests wait; `wanted`
    without one: a preload. `held_bytes` of the device are promised to it, `needed_bytes` when it is on the device,
    `context_bytes` when its worker sleeps; it was measured to hold `over_bytes` more than promised. `ready_in_s`: not
    to be started or promoted before. `idle_left_s`: for so long it may still stay without a request (None: for ever).
    `gated_s`: for how long its door
    has been shut. `image_wanted_bytes`: what an image of it would take (0: it has one, or can have none); `filling`:
    its image is being filled; `stored`: the swap store has it.
    """

    candidate: Candidate
    number: int
    process: Process
    on_device: bool = False
    settled: bool = True
    arriving: bool = False
    is_open: bool = False
    queued: int = 0
    wanted: bool = False
    held_bytes: int = 0
    needed_bytes: int = 0
    context_bytes: int = 0
    over_bytes: int = 0
    ready_in_s: float = 0.0
    idle_left_s: float | None = None
    unload: bool = False
    gated_s: float | None = None
    image_wanted_bytes: int = 0
    filling: bool = False
    stored: bool = False

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def lacking_bytes(self) -> int:
        """Until it is on the device, or until its worker lives."""
        wanted = self.needed_bytes if self.process is Process.ALIVE else self.context_bytes
        return max(0, wanted - self.held_bytes)


@dataclass(frozen=True, slots=True)
class Look:
    """A device at one moment. `busy`: a transition is under way; `starting`: so many workers are.

    `excess_bytes` are promised of it and no longer there: others took them. `elsewhere`: models of other devices whose
    images may go; `reading`: an image is filled for one of them. `saved_s`: switching time saved up.
    """

    free_bytes: int
    standings: Sequence[Standing]
    busy: bool = False
    starting: int = 0
    dram_free_bytes: int = 0
    excess_bytes: int = 0
    elsewhere: Sequence[Candidate] = ()
    reading: bool = False
    saved_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Bring:
    """A transition: the moves, then the model's worker is started or its weights promoted."""

    model: str
    verb: Literal["start", "promote"]
    nbytes: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """An image is filled while others go on switching; `drops` make room for it."""

    model: str
    drops: tuple[Move, ...]


@dataclass(slots=True)
class Decision:
    """What to begin now; `again_s`: when to look again if nothing changes before.

    `gates`: whose doors have to be shut, all others' are open. `grow`: promise these what they hold. `send`: moves for
    nobody's sake. `gone`: told to leave, and off the device. `forget`: no longer brought in without a request.
    `crowded`: no plan helps these. At most one of `bring` and `send` is set.
    """

    again_s: float
    gates: set[str] = field(default_factory=set)
    grow: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    forget: list[str] = field(default_factory=list)
    crowded: list[str] = field(default_factory=list)
    starts: list[Bring] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    bring: Bring | None = None
    send: list[Move] = field(default_factory=list)
