"""The short form of `mball bench chaos`, with workers that have no engine; the counting, on answers made up here."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from mball.bench import chaos
from mball.bench.chaos import Plan, Result
from mball.memory.spec import ModelSpec, WorkerSpec
from mball.units import MiB
from tests import fake_worker, fake_zygote
from tests.fake_worker import Knobs


def model(name: str, knobs: Knobs) -> ModelSpec:
    worker = WorkerSpec(model=name, path=f"/models/{name}", max_num_seqs=4)
    return ModelSpec(worker, environment=knobs.environment())


@pytest.mark.timeout(300)
async def test_killed_hung_and_lying_workers_cost_no_request_its_outcome() -> None:
    slow = Knobs(promote_s=0.05, demote_s=0.05, token_s=0.005, start_s=0.05)
    plan = Plan(
        [model("a", slow), model("b", slow), model("liar", dataclasses.replace(slow, kept_bytes=40 * MiB))],
        command_for=lambda _: fake_worker.command(),
        zygote_for=lambda _: fake_zygote.command(),
        device_bytes=120 * MiB,
        requests=300,
        swaps=30,
        kill_s=0.3,
        hang_every=15,
        request_s=30.0,
        liar="liar",
        settings=dataclasses.replace(
            chaos.SETTINGS, promote_s=2.0, demote_s=2.0, canary_s=2.0, release_s=0.3, verb_s=0.5
        ),
    )
    result = await chaos.run(plan)
    assert result.requests >= 300
    assert result.swaps >= 30
    assert sum(result.outcomes.values()) == result.requests
    assert set(result.outcomes) <= {"ok", "lost", "refused", "error event"}, result.as_dict()
    assert not result.wrong
    assert result.at_once >= 0.97
    assert result.after_one_retry >= 0.97
    assert len(result.faults) >= 5
    assert result.refusals == 0
    assert result.broken_books == 0
    assert result.orphans == 0


def events(*data: str) -> bytes:
    return "".join(f"data: {item}\n\n" for item in data).encode()


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (events('{"choices": [{"text": "a"}]}', '{"choices": [{"text": "b"}]}', "[DONE]"), ("ok", "ab")),
        (events('{"choices": [{"text": "a"}]}'), ("stream with 0 ends", "a")),
        (events("[DONE]", "[DONE]"), ("stream with 2 ends", "")),
        (events('{"error": {"message": "x"}}', "[DONE]"), ("stream with 2 ends", "")),
        (events('{"error": {"message": "its worker ended while it answered"}}'), ("lost", "")),
        (events('{"error": {"message": "x"}}'), ("error event", "")),
    ],
)
def test_the_end_of_a_stream(data: bytes, outcome: tuple[str, str]) -> None:
    assert chaos._events(data) == outcome


def test_shares_and_drift() -> None:
    result = Result(requests=100)
    result.outcomes.update({"ok": 90, "lost": 8, "refused": 2})
    result.later.update({"ok": 8, "refused": 1, "lost": 1})
    assert result.at_once == 90 / 92
    assert result.after_one_retry == 98 / 99
    assert result.rss_drift is None
    result.rss = [(swap, 2000 if swap < 100 else 1000 + swap // 20) for swap in range(300)]
    assert result.rss_drift == pytest.approx(9 / 1005, abs=0.002)


async def test_a_wrong_answer_is_found() -> None:
    """The same workers, but what they say under chaos is longer than what they said alone."""
    plan = Plan(
        [model("a", Knobs())],
        command_for=lambda _: fake_worker.command(),
        zygote_for=lambda _: None,
        device_bytes=120 * MiB,
        requests=10,
        swaps=1,
        clients=2,
        kill_s=600.0,
    )
    before = chaos._alone

    async def other(plan: Plan, folder: object) -> dict[tuple[str, str], str]:
        return {("a", prompt): "something else" for prompt in chaos.PROMPTS}

    chaos._alone = other  # type: ignore[assignment]
    try:
        result = await asyncio.wait_for(chaos.run(plan), 60.0)
    finally:
        chaos._alone = before
    assert len(result.wrong) == result.outcomes["wrong"] == result.requests
