"""Candidate tables equal the formulas written out slowly; coupled ones guess the very token that is drawn."""

from __future__ import annotations

import math

import pytest
import torch

from jetflow_cluster.tree import coupled
from jetflow_cluster.tree.build import SCORE_UNIT, CandidateTable
from jetflow_cluster.tree.coupled import POOL_SIZE, DraftSampling, candidate_tables
from jetflow_cluster.tree.noise import gumbel_noise
from jetflow_kernels.cpu import cpu_kernels

ANCHORS = [3, 1, 4, 1, 5, 9]


class TableSideCar:
    """A pairwise correction of full rank: a table of all pairs."""

    def __init__(self, vocab: int, seed: int = 0, size: float = 1.5):
        self.table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)) * size
        self.parent, self.child = self.table, torch.eye(vocab)


@pytest.fixture(params=["c", "torch"], autouse=True)
def made_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes the tables of greedy requests."""
    if request.param == "torch":
        monkeypatch.setattr(coupled, "draft_candidates", lambda logits, **options: None)
    elif cpu_kernels().functions is None:
        pytest.skip(cpu_kernels().detail)


def random_logits(num_requests: int, depth: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_requests * 100 + depth)
    return (torch.randn(num_requests, depth, vocab, generator=generator) * 2).to(dtype)


def sampled(temperature: float, seed: int = 11, anchor_position: int = 40) -> DraftSampling:
    return DraftSampling(temperature=temperature, seed=seed, anchor_position=anchor_position)


def slow_depth(logits: torch.Tensor, depth: int, width: int, sampling: DraftSampling | None, sharpness: float):
    """Ids of one depth's candidates with their log-probabilities, and the mass of all other tokens."""
    factor = sharpness if sampling is None and depth > 1 else 1.0
    logq = (factor * logits.double()).log_softmax(-1)
    ranked = sorted(range(len(logq)), key=lambda token: -logq[token].item())
    if sampling is None:
        scores = {token: logq[token].item() for token in ranked}
    else:
        position = torch.tensor(sampling.anchor_position + depth)
        pool = ranked[:POOL_SIZE]
        noise = gumbel_noise(sampling.seed, position, torch.tensor(pool)).tolist()
        noised = {t: logq[t].item() / sampling.temperature + g for t, g in zip(pool, noise, strict=True)}
        best = max(noised.values())
        total = best + math.log(sum(math.exp(s - best) for s in noised.values()))
        scores = {token: score - total for token, score in noised.items()}
    chosen = sorted(scores, key=lambda token: -scores[token])[:width]
    rest = sum(math.exp(score) for token, score in scores.items() if token not in chosen)
    return chosen, [scores[token] for token in chosen], rest


def check_table(table: CandidateTable, logits, width, sampling, sidecar, sharpness=1.0):
    """Compares one request's table with the slow formulas."""
    depth, vocab = logits.shape
    width = min(width, vocab)
    slow = [slow_depth(logits[d], d + 1, width, sampling, sharpness) for d in range(depth)]
    assert table.ids.dtype == torch.int64
    assert table.scores.dtype == torch.int32
    assert table.ids.tolist() == [ids for ids, _, _ in slow]
    num_parents = width if sidecar is not None and depth > 1 else 1
    assert table.scores.shape == (depth, num_parents, width)
    for d, (ids, scores, rest) in enumerate(slow):
        for p in range(num_parents):
            delta = torch.zeros(width)
            if d and sidecar is not None:
                delta = sidecar.table[slow[d - 1][0][p], ids].double()
                if sampling is not None:
                    delta = delta / sampling.temperature
            joint = [score + x for score, x in zip(scores, delta.tolist(), strict=True)]
            total = math.log(sum(math.exp(score) for score in joint) + rest)
            expected = [max((score - total) * SCORE_UNIT, -(2**24)) for score in joint]
            assert table.scores[d, p].tolist() == pytest.approx(expected, abs=8, rel=1e-6)
    assert (table.scores <= 0).all()


CASES = [
    pytest.param(1, 1, 100, 16, id="one-depth"),
    pytest.param(1, 7, 100, 16, id="block-8"),
    pytest.param(3, 4, 200, 5, id="batch"),
    pytest.param(2, 3, 10, 16, id="width-over-vocabulary"),
    pytest.param(2, 3, 70, 1, id="width-1"),
]


@pytest.mark.parametrize("with_sidecar", [False, True], ids=["marginal", "sidecar"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("num_requests, depth, vocab, width", CASES)
def test_tables_equal_slow_formulas(num_requests, depth, vocab, width, temperature, with_sidecar):
    logits = random_logits(num_requests, depth, vocab)
    sidecar = TableSideCar(vocab) if with_sidecar else None
    sampling = [sampled(temperature, seed=2**63 + r) if temperature else None for r in range(num_requests)]
    tables = candidate_tables(
        logits, width=width, anchor_ids=ANCHORS[:num_requests], sampling=sampling, sidecar=sidecar
    )
    assert len(tables) == num_requests
    for r, table in enumerate(tables):
        check_table(table, logits[r], width, sampling[r], sidecar)


@pytest.mark.parametrize("with_sidecar", [False, True], ids=["marginal", "sidecar"])
def test_greedy_and_sampled_in_one_batch(with_sidecar):
    logits = random_logits(5, 4, 90)
    sidecar = TableSideCar(90) if with_sidecar else None
    sampling = [sampled(1.0), None, sampled(0.5, seed=2**64 - 1, anchor_position=7), None, sampled(1.3, seed=0)]
    tables = candidate_tables(
        logits, width=8, anchor_ids=ANCHORS[:5], sampling=sampling, sidecar=sidecar, sharpness=1.4
    )
    for r, table in enumerate(tables):
        check_table(table, logits[r], 8, sampling[r], sidecar, sharpness=1.4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    logits = random_logits(1, 3, 50, dtype)
    # Equal logits, common in half precision, leave the order of candidates open.
    distinct = torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(d)) for d in range(3)]).to(dtype)
    for x in (logits, distinct[None] / 8):
        table = candidate_tables(x, width=6, anchor_ids=[0], sampling=[None])[0]
        reference = x[0].double().log_softmax(-1).topk(6).values * SCORE_UNIT
        torch.testing.assert_close(table.scores[:, 0].double(), reference, atol=8, rtol=1e-6)
    check_table(table, distinct / 8, 6, None, None)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 2.0])
def test_head_that_knows_the_target_guesses_every_drawn_token(temperature):
    num_depths, vocab, position, seed = 6, POOL_SIZE, 123, 987_654_321
    logits = random_logits(1, num_depths, vocab, torch.float64)
    table = candidate_tables(
        logits,
        width=3,
        anchor_ids=[0],
        sampling=[DraftSampling(temperature=temperature, seed=seed, anchor_position=position)],
    )[0]
    for d in range(num_depths):
        noise = gumbel_noise(seed, torch.tensor(position + 1 + d), torch.arange(vocab))
        assert table.ids[d, 0] == (logits[0, d] / temperature + noise).argmax()


def test_extreme_corrections_and_low_temperature_stay_finite():
    sidecar = TableSideCar(100, size=60.0)
    tables = candidate_tables(
        random_logits(2, 4, 100), width=8, anchor_ids=[0, 1], sampling=[None, sampled(0.001)], sidecar=sidecar
    )
    for table in tables:
        assert (table.scores <= 0).all()
        assert (table.scores >= -(2**24)).all()
        assert (table.scores[1:].amax(-1) > -(2**24)).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"width": 0}, "width = 0", id="width"),
        pytest.param({"sampling": [None]}, "sampling", id="sampling"),
        pytest.param({"anchor_ids": [1]}, "anchor_ids", id="anchors"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    arguments = {"width": 4, "anchor_ids": [1, 2], "sampling": [None, None]} | changes
    with pytest.raises(ValueError, match=message):
        candidate_tables(random_logits(2, 3, 20), **arguments)
