import json
import sys
from pathlib import Path

import pytest

from mball.bench import runner
from mball.bench.runner import Contender, difference, run


def says(*results: object, log: Path | None = None, name: str = "") -> list[str]:
    """A command that notes its turn and prints a result."""
    note = f"open({str(log)!r}, 'a').write({name!r} + '\\n');" if log else ""
    return [sys.executable, "-c", f"{note}print('noise'); print({json.dumps(json.dumps(results[0]))})"]


def fails(text: str) -> list[str]:
    return [sys.executable, "-c", f"raise SystemExit({text!r})"]


def checked(**digests: str) -> list[str]:
    return says({"digests": digests, "facts": {"seen": len(digests)}})


def test_rounds_in_turn_and_what_is_done_before_each(tmp_path: Path) -> None:
    log = tmp_path / "log"
    names = ("a", "b", "c")
    contenders = [Contender(name, checked(x="1"), says({"s": 1.5}, log=log, name=name)) for name in names]
    before: list[int] = []
    outcomes = run(contenders, rounds=3, before_each=lambda: before.append(1))
    assert [outcome.rounds for outcome in outcomes] == [[{"s": 1.5}] * 3] * 3
    assert log.read_text().split() == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert len(before) == 3 + 9
    assert outcomes[0].facts == {"seen": 1, "compared": 1}


def test_a_wrong_result_is_not_timed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    outcomes = run(
        [
            Contender("reference", checked(x="1", y="2"), says({"s": 1.0})),
            Contender("wrong", checked(x="1", y="3"), says({"s": 0.1}, log=log, name="wrong")),
            Contender("other", checked(z="1"), says({"s": 0.1}, log=log, name="other")),
            Contender("part", checked(x="1"), says({"s": 2.0})),
        ],
        rounds=1,
    )
    assert outcomes[1].not_run == "its result differs from the reference: y"
    assert outcomes[2].not_run == "its result has none of the names that the reference has"
    assert not log.exists()
    assert outcomes[3].rounds == [{"s": 2.0}]
    assert outcomes[3].facts["compared"] == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (fails("no memory left"), "ended with 1: no memory left"),
        (says({"cannot": "it is not installed"}), "it is not installed"),
        (says([]), "printed no result"),
        ([sys.executable, "-c", "print('x')"], "printed no result"),
        ([sys.executable, "-c", ""], "printed no result"),
    ],
)
def test_what_cannot_run_says_why_and_the_others_go_on(command: list[str], reason: str) -> None:
    good = Contender("good", checked(x="1"), says({"s": 1.0}))
    outcomes = run([Contender("bad", command, command), good, Contender("late", good.check, command)], rounds=2)
    assert outcomes[0].not_run == reason
    assert outcomes[0].rounds == []
    assert len(outcomes[1].rounds) == 2
    assert outcomes[2].not_run == f"round 1: {reason}"


def test_one_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TIMEOUT_S", 0.2)
    hangs = [sys.executable, "-c", "import threading; threading.Event().wait(60)"]
    assert run([Contender("hangs", hangs, hangs)], rounds=1)[0].not_run == "took over 0 s"


def test_difference() -> None:
    assert difference({}, {}) is None
    assert difference({"a": "1"}, {"a": "1", "b": "2"}) is None
    assert difference({"a": "1", "b": "1"}, {"a": "2", "b": "2"}) == "its result differs from the reference: a, b"
