import json
import sys
from pathlib import Path

import pytest

from mball.bench.contenders import Cannot
from mball.bench.runner import Contender, Outcome, difference, rotated, run

REFERENCE = {"x": "1", "y": "2"}
BEGIN = "import json, sys; print('a library says hello'); print('ready', flush=True); go = json.loads(input());"


def says(result: object, log: Path | None = None, name: str = "") -> list[str]:
    """A command that notes its turn and what it was told, and prints a result."""
    note = f"open({str(log)!r}, 'a').write({name!r} + ' ' + str(go['digest']) + '\\n');" if log else ""
    return [sys.executable, "-c", f"{BEGIN}{note}print('noise'); print({json.dumps(json.dumps(result))})"]


def gives(seconds: float, **digests: str) -> dict[str, object]:
    return {"s": seconds, "digests": digests, "facts": {"seen": len(digests)}}


def dies(text: str, *, early: bool = False) -> list[str]:
    return [sys.executable, "-c", f"{'' if early else BEGIN}raise SystemExit({text!r})"]


def test_rounds_in_turn_and_what_is_done_before_each(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before: list[str] = []
    contenders = [
        Contender(name, says(gives(1.5, x="1"), log, name), before=lambda name=name: before.append(name))
        for name in ("a", "b", "c")
    ]
    seen: list[int] = []
    outcomes = run(
        contenders, reference=REFERENCE, rounds=3, after_round=lambda found: seen.append(len(found[0].rounds))
    )
    assert [outcome.rounds for outcome in outcomes] == [[{"s": 1.5}] * 3] * 3
    turns = [line.split() for line in log.read_text().splitlines()]
    assert [name for name, _ in turns] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [digest for _, digest in turns] == ["True"] * 3 + ["False"] * 6
    assert before == [name for name, _ in turns]
    assert seen == [1, 2, 3]
    assert outcomes[0].facts == {"seen": 1, "compared": 1}


def test_all_have_started_before_the_first_works(tmp_path: Path) -> None:
    started = tmp_path / "started"
    late = f"import time; time.sleep(0.5); open({str(started)!r}, 'w').close();"
    sees = f"import os; print(json.dumps({{'there': os.path.exists({str(started)!r})}}))"
    contenders = [
        Contender("first", [sys.executable, "-c", BEGIN + sees], compared=False),
        Contender("slow to start", [sys.executable, "-c", late + BEGIN + "print('{}')"], compared=False),
    ]
    assert run(contenders, reference={}, rounds=1)[0].rounds == [{"there": True}]


def test_a_wrong_result_has_no_figures(tmp_path: Path) -> None:
    log = tmp_path / "log"
    outcomes = run(
        [
            Contender("right", says(gives(1.0, x="1", y="2"))),
            Contender("wrong", says(gives(0.1, x="1", y="3"), log, "wrong")),
            Contender("other", says(gives(0.1, z="1"))),
            Contender("part", says(gives(2.0, x="1"))),
            Contender("silent", says({"s": 0.1})),
            Contender("hardware", says({"s": 0.1}), compared=False),
        ],
        reference=REFERENCE,
        rounds=2,
    )
    assert [len(outcome.rounds) for outcome in outcomes] == [2, 0, 0, 2, 0, 2]
    assert outcomes[1].not_run == "its result differs from the reference: y"
    assert outcomes[2].not_run == "its result has none of the names that the reference has"
    assert outcomes[4].not_run == outcomes[2].not_run
    assert log.read_text() == "wrong True\n"
    assert outcomes[3].facts["compared"] == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (dies("no memory left"), "ended with 1: no memory left"),
        (dies("no memory left", early=True), "ended with 1: no memory left"),
        (says({"cannot": "the disk is full"}), "the disk is full"),
        ([sys.executable, "-c", 'print(\'{"cannot": "it is not installed"}\')'], "it is not installed"),
        (says([]), "printed no result"),
        ([sys.executable, "-c", f"{BEGIN}print('x')"], "printed no result"),
        ([sys.executable, "-c", ""], "printed no result"),
    ],
)
def test_what_cannot_run_says_why_and_the_others_go_on(command: list[str], reason: str) -> None:
    good = says(gives(1.0, x="1"))
    outcomes = run([Contender("bad", command), Contender("good", good)], reference=REFERENCE, rounds=2)
    assert outcomes[0].not_run == reason
    assert outcomes[0].rounds == []
    assert len(outcomes[1].rounds) == 2


def test_a_later_failure_keeps_the_rounds_before(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    once = f"import os; seen = os.path.exists({str(mark)!r}); open({str(mark)!r}, 'w').close();"
    command = [sys.executable, "-c", f"{BEGIN}{once}print('{{\"s\": 1.0}}' if not seen else 1 / 0)"]
    (outcome,) = run([Contender("late", command, compared=False)], reference={}, rounds=3)
    assert outcome == Outcome(
        "late", rounds=[{"s": 1.0}], not_run="round 2: ended with 1: ZeroDivisionError: division by zero"
    )


def test_what_cannot_be_prepared_for_is_not_run() -> None:
    def before() -> None:
        raise Cannot("3 pages stay in the page cache")

    (outcome,) = run([Contender("cold", says(gives(1.0, x="1")), before)], reference=REFERENCE, rounds=1)
    assert outcome.not_run == "3 pages stay in the page cache"


def test_a_slow_one_has_one_round() -> None:
    contenders = [
        Contender("slow", says({"first_s": 3.0}), compared=False),
        Contender("fast", says({"first_s": 1.0}), compared=False),
    ]
    outcomes = run(contenders, reference={}, rounds=3, limit_s=2.0)
    assert [len(outcome.rounds) for outcome in outcomes] == [1, 3]
    assert outcomes[0].not_run is None


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_rounds_are_the_same_whether_they_start_together_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    log = tmp_path / "log"
    contenders = [Contender(name, says({"s": 1.0}, log, name), compared=False) for name in ("a", "b")]
    outcomes = run(contenders, reference={}, rounds=5)
    assert [len(outcome.rounds) for outcome in outcomes] == [5, 5]
    assert [line[0] for line in log.read_text().splitlines()] == list("abbaabbaab")


@pytest.mark.parametrize("early", [True, False])
def test_one_that_hangs_is_ended(early: bool) -> None:
    hangs = [sys.executable, "-c", f"{'' if early else BEGIN}import threading; threading.Event().wait(60)"]
    (outcome,) = run([Contender("hangs", hangs)], reference={}, rounds=1, timeout_s=0.3)
    assert outcome.not_run is not None
    assert "took over 0 s" in outcome.not_run


def test_rotation_gives_each_the_first_place_once() -> None:
    items = ["a", "b", "c"]
    assert [rotated(items, turn)[0] for turn in range(6)] == items * 2
    assert all(sorted(rotated(items, turn)) == items for turn in range(6))
    assert rotated([], 3) == []


def test_difference() -> None:
    assert difference({}, {}) is None
    assert difference({"a": "1"}, {"a": "1", "b": "2"}) is None
    assert difference({"a": "1", "b": "1"}, {"a": "2", "b": "2"}) == "its result differs from the reference: a, b"
