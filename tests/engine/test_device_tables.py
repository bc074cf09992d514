"""What recorded steps do to candidate tables gives the tables that the host makes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from jetflow_cluster.engine.device_calibration import calibrate_on_device
from jetflow_cluster.engine.device_lookup import mix_on_device, shared_on_device
from jetflow_cluster.engine.value_model import KNOT_SHIFT, NUM_DEPTHS, NUM_KNOTS, ValueModel
from jetflow_cluster.tree.build import MIN_SCORE, CandidateTable, cut_table, to_fixed_point
from jetflow_cluster.tree.lookup import (
    MAX_LOOKUP_DEPTH,
    ContextMatch,
    guess_of,
    guess_weights,
    lookup_table,
    mix_lookup,
)


def tables_of(rng: random.Random, num: int, depth: int, width: int, *, is_conditional: bool) -> list[CandidateTable]:
    """Distinct tokens at each depth, best first under the first parent."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    found = []
    for _ in range(num):
        ids = torch.stack([torch.randperm(40, generator=generator)[:width] for _ in range(depth)])
        logits = torch.randn(depth, width if is_conditional else 1, width + 1, generator=generator) * 3
        scores = to_fixed_point(logits.log_softmax(-1)[..., :-1])
        found.append(CandidateTable(ids=ids, scores=scores))
    return found


@pytest.mark.parametrize("is_conditional", [False, True], ids=["marginal", "conditional"])
@pytest.mark.parametrize("depth", [3, 15, 30])
def test_guesses_are_mixed_as_on_the_host(depth: int, is_conditional: bool) -> None:
    rng = random.Random(f"{depth} {is_conditional}")
    num, width = 40, 16
    tables = tables_of(rng, num, depth, width, is_conditional=is_conditional)
    widths = [rng.choice([1, 2, 5, 15, 16]) for _ in range(num)]
    own = [rng.choice([1, depth, depth, max(1, depth - 2)]) for _ in range(num)]
    guesses: list[ContextMatch | None] = []
    sure = [rng.random() < 0.2 for _ in range(num)]
    for table in tables:
        count = rng.randint(0, MAX_LOOKUP_DEPTH)
        # Often a candidate, and often not.
        tokens = [
            int(table.ids[d, rng.randrange(6)]) if d < depth and rng.random() < 0.7 else rng.randrange(50)
            for d in range(count)
        ]
        guesses.append(ContextMatch(length=rng.choice([1, 3, 8, 24, 32]), token_ids=tokens) if count else None)
    guess_ids = torch.zeros(num, MAX_LOOKUP_DEPTH, dtype=torch.int64)
    weights = torch.zeros(num, MAX_LOOKUP_DEPTH, dtype=torch.float64)
    counts = torch.zeros(num, dtype=torch.int32)
    for r, match in enumerate(guesses):
        if match is not None:
            counts[r] = len(match.token_ids)
            guess_ids[r, : counts[r]] = torch.tensor(match.token_ids)
            weights[r, : counts[r]] = torch.tensor(guess_weights(match), dtype=torch.float64)
        sure[r] = sure[r] and match is not None
    given = {
        "guess_ids": guess_ids,
        "num_guesses": counts,
        "num_own": torch.tensor([0 if s else n for n, s in zip(own, sure, strict=True)], dtype=torch.int32),
        "widths": torch.tensor([1 if s else w for w, s in zip(widths, sure, strict=True)], dtype=torch.int32),
    }
    own_ids = torch.stack([table.ids for table in tables])
    ids, scores = mix_on_device(own_ids, torch.stack([table.scores for table in tables]), weights=weights, **given)
    shared = shared_on_device(own_ids, **given)
    assert shared.dtype is torch.int32 and shared.max() > 1
    for r, (table, match) in enumerate(zip(tables, guesses, strict=True)):
        cut = cut_table(CandidateTable(ids=table.ids[: own[r]], scores=table.scores[: own[r]]), widths[r])
        expected = cut
        if match is not None:
            expected = lookup_table(match) if sure[r] else mix_lookup(cut, match)
            assert shared[r] == guess_of(match, None if sure[r] else cut).num_shared
        d, w = expected.ids.shape
        assert torch.equal(ids[r, :d, :w], expected.ids)
        assert torch.equal(scores[r, :d, :w, :w], expected.scores.expand(-1, w, -1))


def test_scores_are_calibrated_as_on_the_host() -> None:
    rng = random.Random(1)
    tables = tables_of(rng, 12, 11, 16, is_conditional=True)
    tables[0].scores[0, 0, :3] = torch.tensor([0, MIN_SCORE, -NUM_KNOTS << KNOT_SHIFT])
    kinds = [rng.randrange(2) for _ in tables]
    model = ValueModel()
    steps = np.random.default_rng(2).integers(0, 3 << KNOT_SHIFT, (2, NUM_DEPTHS, NUM_KNOTS))
    model.maps = np.cumsum(steps, -1).astype(np.int32)
    expected = model.calibrate(tables, kinds)
    found = calibrate_on_device(
        torch.stack([table.scores for table in tables]),
        torch.from_numpy(model.maps),
        torch.tensor(kinds, dtype=torch.int32),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs is not None
        assert torch.equal(ours, theirs.scores)
