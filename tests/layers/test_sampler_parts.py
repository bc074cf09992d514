"""The sampler's parts on scores that show every edge: what filters keep and what penalties write."""

from __future__ import annotations

import math
import random

import pytest
import torch

from jetflow_cluster.layers.logits_filters import apply_filters, best_mask
from jetflow_cluster.layers.logits_processing import apply_logit_bias, apply_penalties, apply_suppression
from jetflow_cluster.layers.sampling_row import SamplingRow
from jetflow_cluster.layers.token_counts import TokenCounts
from jetflow_cluster.types import SamplingParams

# Probabilities 1/2, 1/4, 1/8, 1/8 at ids 2, 0, 1, 3; and four equal ones.
HALVES = [math.log(2), 0.0, math.log(4), 0.0]
EQUAL = [0.0] * 4
IMPOSSIBLE = [0.0, -math.inf, 1.0, -math.inf]

KEPT = [
    pytest.param(HALVES, {}, [0, 1, 2, 3], id="no-filter"),
    pytest.param(HALVES, {"top_k": 1}, [2], id="k-1"),
    pytest.param(HALVES, {"top_k": 3}, [0, 1, 2], id="k-cuts-a-tie-behind-the-lower-id"),
    pytest.param(HALVES, {"top_k": 4}, [0, 1, 2, 3], id="k-is-all"),
    pytest.param(EQUAL, {"top_k": 2}, [0, 1], id="k-of-equals"),
    pytest.param(EQUAL, {"top_p": 0.5}, [0, 1], id="p-reached-exactly"),
    pytest.param(EQUAL, {"top_p": 0.51}, [0, 1, 2], id="p-just-over"),
    pytest.param(EQUAL, {"top_p": 0.01}, [0], id="p-tiny-keeps-one"),
    pytest.param(HALVES, {"top_p": 0.49}, [2], id="p-below-the-best"),
    pytest.param(HALVES, {"top_p": 0.76}, [0, 1, 2], id="p-cuts-a-tie"),
    pytest.param(HALVES, {"top_k": 2, "top_p": 0.6}, [2], id="p-of-what-k-left"),
    pytest.param(HALVES, {"top_k": 2, "top_p": 0.7}, [0, 2], id="p-of-what-k-left-is-more"),
    pytest.param(HALVES, {"min_p": 0.3}, [0, 2], id="min-p"),
    pytest.param(HALVES, {"min_p": 1.0}, [2], id="min-p-1"),
    pytest.param(EQUAL, {"min_p": 1.0}, [0, 1, 2, 3], id="min-p-1-of-equals"),
    pytest.param(HALVES, {"top_k": 3, "min_p": 0.4}, [0, 2], id="k-then-min-p"),
    pytest.param(IMPOSSIBLE, {"top_k": 3}, [0, 2], id="k-over-the-possible"),
    pytest.param(IMPOSSIBLE, {"top_p": 0.9999}, [0, 2], id="p-over-the-possible"),
    pytest.param(IMPOSSIBLE, {"top_k": 3, "top_p": 0.3, "min_p": 0.5}, [2], id="all-over-the-possible"),
]


def kept_ids(scores: torch.Tensor) -> list[list[int]]:
    return [[i for i, score in enumerate(row) if score > -math.inf] for row in scores.tolist()]


@pytest.mark.parametrize("scores, options, kept", KEPT)
def test_filters_keep(scores, options, kept):
    work = torch.tensor([scores], dtype=torch.float64)
    assert apply_filters(work, [SamplingParams(**options)]) is bool(options and options != {"top_k": 4})
    assert kept_ids(work) == [kept]
    left = torch.tensor(kept)
    assert torch.equal(work[0, left], torch.tensor(scores, dtype=torch.float64)[left])


def test_rows_with_different_filters_in_one_batch():
    cases = [case.values for case in KEPT]
    work = torch.tensor([scores for scores, _, _ in cases], dtype=torch.float64)
    assert apply_filters(work, [SamplingParams(**options) for _, options, _ in cases])
    assert kept_ids(work) == [kept for _, _, kept in cases]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_best_mask_equals_sorting(dtype):
    scores = torch.randint(0, 6, (8, 50), generator=torch.Generator().manual_seed(1)).to(dtype)
    for num in (1, 7, 49, 50):
        num_kept = torch.full((8, 1), num)
        mask = best_mask(scores, num_kept, scores.topk(num).values[:, -1:])
        for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
            best = sorted(range(50), key=lambda token, row=row: (-row[token], token))[:num]
            assert [i for i, is_kept in enumerate(kept) if is_kept] == sorted(best)


def make_row(counts: TokenCounts, path=(), suppressed_ids=(), **options) -> SamplingRow:
    return SamplingRow(
        params=SamplingParams(**options), seed=0, position=9, counts=counts, path=path, suppressed_ids=suppressed_ids
    )


PENALTIES = {"repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.125}


def test_penalties_by_hand():
    scores = torch.tensor([[3.0, -2.0, 1.5, 0.0, 4.0, -4.0]], dtype=torch.float64)
    # Prompt 0 and 1; output 1 once and 2 twice, once committed and once on the path with 5.
    row = make_row(TokenCounts([0, 1, 0], [1, 2]), path=[2, 5], **PENALTIES)
    apply_penalties(scores, [row])
    expected = [3.0 / 1.5, -2.0 * 1.5 - 0.375, 1.5 / 1.5 - 0.25 - 2 * 0.125, 0.0, 4.0, -4.0 * 1.5 - 0.375]
    assert scores[0].tolist() == expected


def test_path_writes_what_committed_tokens_write():
    rng = random.Random(8)
    for _ in range(100):
        scores = torch.tensor([[rng.gauss(0, 3) for _ in range(12)] for _ in range(3)], dtype=torch.float64)
        other = scores.clone()
        parts = [[[rng.randrange(12) for _ in range(rng.randint(0, 7))] for _ in range(3)] for _ in range(3)]
        options = [rng.choice(({}, PENALTIES, {"presence_penalty": -0.3}, {"repetition_penalty": 0.7})) for _ in parts]
        on_path = [make_row(TokenCounts(p, o), path, **x) for (p, o, path), x in zip(parts, options, strict=True)]
        committed = [make_row(TokenCounts(p, o + path), **x) for (p, o, path), x in zip(parts, options, strict=True)]
        apply_penalties(scores, on_path)
        apply_penalties(other, committed)
        assert torch.equal(scores, other)


def test_bias_and_suppression():
    counts = TokenCounts([0])
    rows = [
        make_row(counts, logit_bias={1: 2.0, 3: -0.5}),
        make_row(counts, suppressed_ids=(0, 3, 3, 4, 10**6)),
        make_row(counts),
    ]
    scores = torch.zeros(3, 4, dtype=torch.float64)
    apply_logit_bias(scores, rows)
    apply_suppression(scores, rows)
    assert scores.tolist() == [[0.0, 2.0, 0.0, -0.5], [-math.inf, 0.0, 0.0, -math.inf], [0.0] * 4]


def test_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="logit_bias names token 4"):
        apply_logit_bias(torch.zeros(2, 4, dtype=torch.float64), [make_row(TokenCounts([0]), logit_bias={4: 1.0})] * 2)
