"""Contenders, each in a process of its own, in turn, several rounds; a wrong result has no figures."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, ParamSpec, TypeVar

from mball.bench.contenders import READY, Cannot

TIMEOUT_S = 900.0

T = TypeVar("T")
P = ParamSpec("P")

Measures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Contender:
    """A command that prints READY once it has imported all it wants, waits for a line, and prints one JSON object.

    The object holds measures by name, `facts`, and `digests` (`{NAME: TEXT}`) where the line asked for them; or
    `{"cannot": REASON}`, which may stand in READY's place too. `before` brings the machine to the wanted state (such as
    a warm page cache) before each of its turns, or raises Cannot. A `compared` one is judged by its digests; the others
    measure the hardware.
    """

    name: str
    command: Sequence[str]
    before: Callable[[], object] = lambda: None
    compared: bool = True
    pass_fds: Sequence[int] = ()


@dataclass(slots=True)
class Outcome:
    """What became of one contender: its rounds, or why it was not timed."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[Measures] = field(default_factory=list)
    not_run: str | None = None


def run(
    contenders: Sequence[Contender],
    *,
    reference: Mapping[str, str],
    rounds: int,
    limit_s: float | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Callable[[str], object] = lambda step: None,
    after_round: Callable[[list[Outcome]], object] = lambda outcomes: None,
) -> list[Outcome]:
    """Time all in an order that turns every round; whose first round's result is not the reference's is out.

    Processes start together, as importing takes long, those of several rounds where there are cores for them, and then
    work one at a time. A contender whose first call (`first_s`) takes more than `limit_s` has one round. One that takes
    `timeout_s` to start, or for a turn, is given up.
    """
    outcomes = [Outcome(contender.name) for contender in contenders]
    pairs = list(zip(contenders, outcomes, strict=True))
    at_once = max(1, 2 * len(os.sched_getaffinity(0)) // max(1, len(pairs)))
    for first in range(0, rounds, at_once):
        numbers = range(first, min(first + at_once, rounds))
        progress(f"round {first + 1} of {rounds}: starting")
        with contextlib.ExitStack() as ends:
            entered = [(number, *pair) for number in numbers for pair in pairs if _goes_on(pair[1], limit_s)]
            started = {
                (number, contender.name): ends.enter_context(_Process(contender, timeout_s))
                for number, contender, _ in entered
            }
            for number, contender, outcome in entered:
                if outcome.not_run is None:
                    _guarded(outcome, number, started[number, contender.name].wait_ready)
            for number in numbers:
                for contender, outcome in rotated(pairs, number):
                    if _goes_on(outcome, limit_s):
                        progress(f"round {number + 1} of {rounds}: {contender.name}")
                        _round(contender, outcome, number, started[number, contender.name], reference)
                after_round(outcomes)
    return outcomes


def _goes_on(outcome: Outcome, limit_s: float | None) -> bool:
    slow = limit_s is not None and bool(outcome.rounds) and outcome.rounds[0].get("first_s", 0.0) > limit_s
    return outcome.not_run is None and not slow


def _round(
    contender: Contender, outcome: Outcome, number: int, process: _Process, reference: Mapping[str, str]
) -> None:
    result = _guarded(outcome, number, _turn, contender, process, number == 0)
    if result is None:
        return
    outcome.facts |= result.pop("facts", {})
    digests = result.pop("digests", {})
    if number == 0 and contender.compared:
        outcome.not_run = difference(digests, reference)
        outcome.facts["compared"] = len(digests.keys() & reference.keys())
    if outcome.not_run is None:
        outcome.rounds.append(result)


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The same items, begun `turn` places later, so that over as many rounds each is first once."""
    start = turn % len(items) if items else 0
    return [*items[start:], *items[:start]]


def merge(outcomes: list[Outcome], turn: Sequence[Outcome]) -> None:
    """Adds the rounds of a turn to what is known."""
    for one in turn:
        known = next((outcome for outcome in outcomes if outcome.name == one.name), None)
        if known is None:
            outcomes.append(one)
        else:
            known.rounds += one.rounds
            known.not_run = known.not_run or one.not_run


def difference(digests: Mapping[str, str], reference: Mapping[str, str]) -> str | None:
    """Why a result isn't the reference's; None where everything both name is equal, and they name something."""
    common = digests.keys() & reference.keys()
    if reference and not common:
        return "its result has none of the names that the reference has"
    wrong = sorted(name for name in common if digests[name] != reference[name])
    return f"its result differs from the reference: {', '.join(wrong[:3])}" if wrong else None


def _turn(contender: Contender, process: _Process, digest: bool) -> dict[str, Any]:
    contender.before()
    return process.result(digest=digest)


def _guarded(outcome: Outcome, number: int, call: Callable[P, T], *given: P.args, **named: P.kwargs) -> T | None:
    """What the call gives; None where the process can't give one, and then the outcome says why."""
    try:
        return call(*given, **named)
    except Cannot as error:
        outcome.not_run = str(error) if number == 0 else f"round {number + 1}: {error}"
        return None


class _Process:
    """One contender's process, from its start to its end."""

    def __init__(self, contender: Contender, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            contender.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            pass_fds=contender.pass_fds,
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def wait_ready(self) -> None:
        line = self._line()
        if line != READY:
            raise Cannot(self._why(line))

    def result(self, *, digest: bool) -> dict[str, Any]:
        try:
            out, _ = self._process.communicate(json.dumps({"digest": digest}).encode() + b"\n", self._timeout_s)
        except subprocess.TimeoutExpired:
            raise Cannot(f"took over {self._timeout_s:.0f} s") from None
        lines = out.decode(errors="replace").strip().splitlines()
        if self._process.returncode != 0 or not lines:
            raise Cannot(self._why(""))
        result = _parsed(lines[-1])
        if result is None or "cannot" in result:
            raise Cannot(self._why(lines[-1]))
        return result

    def _line(self) -> str:
        """The first line that is READY or JSON: libraries print lines of their own."""
        stdout = self._process.stdout
        while stdout is not None:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0 or not select.select([stdout], [], [], left_s)[0]:
                raise Cannot(f"took over {self._timeout_s:.0f} s to start")
            line = stdout.readline()
            if not line:
                break
            text = line.decode(errors="replace").strip()
            if text == READY or _parsed(text) is not None:
                return text
        return ""

    def _why(self, line: str) -> str:
        result = _parsed(line)
        if result is not None and "cannot" in result:
            return str(result["cannot"])
        code = self._process.wait(self._timeout_s)
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        if code == 0:
            return "printed no result"
        return f"ended with {code}{': ' + said[-1] if said else ''}"


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
