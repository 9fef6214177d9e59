"""Drawing: what each parameter does, whose noise it is, and that the draws follow the distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.server.engine.api import SamplingParams
from mball.server.engine.sampler import Row, _keys, gumbel, logprobs, sample

VOCAB = 2500


def row(
    position: int = 0, seed: int = 1, num_output: int = 0, counts: dict[int, int] | None = None, **params: Any
) -> Row:
    return Row(SamplingParams(**{"max_tokens": 1, "seed": seed, **params}), position, num_output, counts or {})


def logits(rows: int, seed: int = 0, width: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def draw(values: torch.Tensor, rows: list[Row]) -> list[int | None]:
    return [drawn.token_id for drawn in sample(values, rows)]


params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "top_k": st.sampled_from([0, 1, 5, 1500, VOCAB, VOCAB + 7]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "logit_bias": st.sampled_from([{}, {3: 50.0}, {9: -100.0}]),
        "seed": st.integers(0, 2**63),
        "position": st.integers(0, 10_000),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(params, min_size=1, max_size=6))
def test_a_row_draws_the_same_alone_and_in_any_batch(choices: list[dict[str, Any]]) -> None:
    rows = [row(counts={1: 2, 4: 1}, **choice) for choice in choices]
    values = logits(len(rows))
    together = draw(values, rows)
    assert together == [draw(values[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    order = list(reversed(range(len(rows))))
    assert draw(values[order], [rows[i] for i in order]) == [together[i] for i in order]


def naive_support(values: torch.Tensor, top_k: int, top_p: float) -> dict[int, float]:
    """Top_k, then the smallest set whose mass reaches top_p, by sorting all; with each token's share."""
    order = values.argsort(descending=True)
    if top_k:
        order = order[:top_k]
    mass = values[order].softmax(-1)
    kept: dict[int, float] = {}
    for token, share in zip(order.tolist(), mass.tolist(), strict=True):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = share
    return kept


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (0, 0.999), (50, 0.5), (1024, 0.9), (1500, 0.8)])
def test_top_k_and_top_p_keep_what_sorting_all_would(scale: float, top_k: int, top_p: float) -> None:
    values = logits(1) * scale
    support = naive_support(values[0].double(), top_k, top_p)
    rows = [row(position=position, top_k=top_k, top_p=top_p) for position in range(400)]
    drawn = set(draw(values.expand(400, -1), rows))
    # A token at the bound may fall on either side for reasons of rounding.
    assert len(drawn - support.keys()) <= 1
    assert {token for token, share in support.items() if share > 0.05} <= drawn


def test_the_draws_follow_the_softmax() -> None:
    values = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]])
    count = 20_000
    rows = [row(position=position) for position in range(count)]
    drawn = torch.tensor(draw(values.expand(count, -1), rows)).bincount(minlength=5).double()
    expected = values[0].double().softmax(-1) * count
    assert drawn[4] == 0
    chi_squared = float(((drawn[:4] - expected[:4]) ** 2 / expected[:4]).sum())
    assert chi_squared < 16.3, "p < 0.001 with three degrees of freedom"


def test_temperature_is_that_of_the_softmax() -> None:
    values = torch.tensor([[1.0, 0.0]])
    count = 20_000
    for temperature in (0.5, 2.0):
        rows = [row(position=position, temperature=temperature) for position in range(count)]
        share = draw(values.expand(count, -1), rows).count(0) / count
        assert share == pytest.approx(1 / (1 + math.exp(-1 / temperature)), abs=0.015)


def test_the_noise_is_gumbel_s_and_independent_of_its_neighbours() -> None:
    ids = torch.arange(200_000, dtype=torch.int32)
    rows = [row(position=position, seed=seed) for seed in (0, 1) for position in (0, 1)]
    keys = _keys(rows, torch.device("cpu"))
    noise = gumbel(keys, ids).double()
    assert noise.isfinite().all()
    for one in noise:
        assert float(one.mean()) == pytest.approx(0.5772, abs=0.02)
        assert float(one.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.01
    assert float(torch.corrcoef(torch.stack([noise[0, 1:], noise[0, :-1]]))[0, 1]) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("top_k", "position", "token"), [(0, 217, 3514), (45_000, 959, 26039)])
def test_the_largest_noise_draws_no_token_that_is_ruled_out(top_k: int, position: int, token: int) -> None:
    one = row(position=position, seed=7, top_k=top_k)
    noise = gumbel(_keys([one], torch.device("cpu")), torch.tensor([token], dtype=torch.int32))
    assert 16 < float(noise) < 17, "one of 16 million: found by a search"
    values = torch.zeros(1, 49_152)
    values[0, token] = float("-inf")
    assert draw(values, [one]) != [token]
    values[0, token] = -30.0
    assert draw(values, [one]) != [token]


def test_the_noise_never_changes() -> None:
    """Seeds are a promise to clients: another release draws the same tokens."""
    values = torch.zeros(6, 1000)
    rows = [row(position=position, seed=2**40 + 5) for position in range(6)]
    assert draw(values, rows) == [974, 641, 362, 526, 826, 533]


def test_greedy_takes_the_largest_after_bias_and_penalties() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 0.0]] * 5)
    rows = [
        row(temperature=0.0),
        row(temperature=0.0, logit_bias={3: 100.0}),
        row(temperature=0.0, presence_penalty=1.5, counts={2: 1}),
        row(temperature=0.0, frequency_penalty=0.9, counts={2: 3, 1: 1}),
        row(temperature=0.0, min_tokens=2, num_output=1, stop_token_ids=frozenset({2})),
    ]
    assert draw(values, rows) == [2, 3, 1, 1, 1]
    assert draw(values[4:], [row(temperature=0.0, min_tokens=2, num_output=2, stop_token_ids=frozenset({2}))]) == [2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_their_own_row(bad: float) -> None:
    values = logits(4)
    clean = draw(values, [row(temperature=t, top_p=p) for t, p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9), (1.0, 1.0))])
    values[1, 7] = bad
    values[2, 9] = bad
    drawn = draw(values, [row(temperature=t, top_p=p) for t, p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9), (1.0, 1.0))])
    assert drawn == [clean[0], None, None, clean[3]]


def test_logprobs_come_from_the_raw_logits_and_are_as_many_as_wanted() -> None:
    values = logits(3)
    rows = [
        row(temperature=0.5, logit_bias={4: 100.0}, logprobs=2),
        row(temperature=0.0),
        row(temperature=0.0, logprobs=0),
    ]
    drawn = sample(values.bfloat16(), rows)
    expected = values.bfloat16().float().log_softmax(-1)
    assert drawn[0].token_id == 4
    assert drawn[0].logprob is not None
    assert drawn[0].logprob.logprob == pytest.approx(float(expected[0, 4]), abs=1e-4)
    assert [top.token_id for top in drawn[0].top_logprobs] == expected[0].topk(2).indices.tolist()
    assert drawn[1].logprob is None
    assert drawn[2].logprob is not None
    assert drawn[2].top_logprobs == ()
    (own, top), *_ = logprobs(values, [5, 6, 7], [0, 1, 3])
    assert (own.token_id, top) == (5, ())


def test_the_logits_given_are_not_changed() -> None:
    values = logits(2)
    before = values.clone()
    sample(values, [row(logit_bias={1: 5.0}, top_p=0.5), row(presence_penalty=1.0, counts={3: 1})])
    assert torch.equal(values, before)
