"""Contenders, each in a process of its own, in turn, several rounds; a wrong result is found before any is timed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 900.0

Measures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Contender:
    """Two commands that print one JSON object as their last line.

    `check` prints `{"digests": {NAME: TEXT}, "facts": {…}}`, `time` prints measures by name. Either may print
    `{"cannot": REASON}` instead.
    """

    name: str
    check: Sequence[str]
    time: Sequence[str]


@dataclass(slots=True)
class Outcome:
    """What became of one contender: its rounds, or why it was not timed."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[Measures] = field(default_factory=list)
    not_run: str | None = None


class _Cannot(Exception):
    """A contender's process did not give a result."""


def run(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    before_each: Callable[[], object] = lambda: None,
    progress: Callable[[str], object] = lambda step: None,
) -> list[Outcome]:
    """Check all, then time those that agree with the first (the reference), in an order that turns every round.

    `before_each` brings the machine to the wanted state (such as a warm page cache) before every process.
    """
    outcomes = [Outcome(contender.name) for contender in contenders]
    reference: Mapping[str, str] | None = None
    for contender, outcome in zip(contenders, outcomes, strict=True):
        progress(f"checking {contender.name}")
        before_each()
        try:
            checked = _result(contender.check)
        except _Cannot as error:
            outcome.not_run = str(error)
            continue
        outcome.facts = checked["facts"]
        reference = checked["digests"] if reference is None else reference
        outcome.not_run = difference(checked["digests"], reference)
        outcome.facts["compared"] = len(checked["digests"].keys() & reference.keys())
    entered = [pair for pair in zip(contenders, outcomes, strict=True) if pair[1].not_run is None]
    for number in range(rounds):
        turn = number % max(1, len(entered))
        for contender, outcome in entered[turn:] + entered[:turn]:
            if outcome.not_run is not None:
                continue
            progress(f"round {number + 1} of {rounds}: {contender.name}")
            before_each()
            try:
                outcome.rounds.append(_result(contender.time))
            except _Cannot as error:
                outcome.not_run = f"round {number + 1}: {error}"
    return outcomes


def difference(digests: Mapping[str, str], reference: Mapping[str, str]) -> str | None:
    """Why a result isn't the reference's; None where everything both name is equal, and they name something."""
    common = digests.keys() & reference.keys()
    if reference and not common:
        return "its result has none of the names that the reference has"
    wrong = sorted(name for name in common if digests[name] != reference[name])
    return f"its result differs from the reference: {', '.join(wrong[:3])}" if wrong else None


def _result(command: Sequence[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise _Cannot(f"took over {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise _Cannot(f"ended with {done.returncode}{': ' + said[-1] if said else ''}")
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise _Cannot("printed no result") from None
    if not isinstance(result, dict) or "cannot" in result:
        raise _Cannot(str(result["cannot"]) if isinstance(result, dict) else "printed no result")
    return result
