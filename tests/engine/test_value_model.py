"""Calibration: integers to integers, monotone, learned from walks, and harmless where nothing is known."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from jetflow_cluster.engine.value_model import NUM_KNOTS, ValueModel, apply_maps, promised_tokens
from jetflow_cluster.tree.build import MIN_SCORE, SCORE_UNIT, CandidateTable, build_trees


def tables_of(rng: random.Random, count: int) -> list[CandidateTable]:
    return [
        CandidateTable(
            ids=torch.arange(8).repeat(4, 1) * 10 + torch.arange(4)[:, None],
            scores=torch.tensor(
                [[[-rng.randrange(4 * SCORE_UNIT) for _ in range(8)] for _ in range(8)] for _ in range(4)],
                dtype=torch.int32,
            ),
        )
        for _ in range(count)
    ]


def test_nothing_known_changes_nothing() -> None:
    tables = tables_of(random.Random(0), 3)
    found = ValueModel().calibrate([*tables, None], [0, 1, 0, 1])
    assert found[3] is None
    for table, mapped in zip(tables, found, strict=False):
        assert mapped is not None and torch.equal(mapped.scores, table.scores)


@pytest.mark.parametrize("score", [0, -1, -8191, -8192, -8193, -(127 << 13), -(128 << 13), -(200 << 13), MIN_SCORE])
def test_maps_are_linear_between_knots_and_go_on_with_slope_one(score: int) -> None:
    knots = (3 * np.arange(NUM_KNOTS, dtype=np.int32) << 12) + 77
    expected = -(77 + (min(-score, 128 << 13) * 3 >> 1) + max(-score - (128 << 13), 0))
    (found,) = apply_maps(knots[None], np.array([0]), np.array([score], dtype=np.int32))
    assert found == max(expected, MIN_SCORE)


@pytest.mark.parametrize("truth", [0.3, 1.0], ids=["over-confident", "right"])
def test_what_happened_is_learned(truth: float) -> None:
    """Guesses are right `truth` times as often as they say."""
    rng, model = random.Random(4), ValueModel()
    promised = accepted = 0.0
    for step in range(2000):
        tables = model.calibrate(raw := tables_of(rng, 1), [0])
        (tree,) = build_trees(tables, [0], max_nodes=[12], max_depths=[1])
        nodes, depth, parent_rank = [0], 0, 0
        while True:
            children = tree.children(nodes[-1])
            ranks = {child: (tree.token_ids[child] - depth) // 10 for child in children}
            draw = rng.random()
            for child in children:
                draw -= truth / 8 * np.exp(int(raw[0].scores[depth, parent_rank, ranks[child]]) / SCORE_UNIT)
                if draw < 0:
                    break
            else:
                break
            nodes.append(child)
            parent_rank, depth = ranks[child], depth + 1
        said = promised_tokens(tree)
        model.observe([tree], [nodes], [0])
        if step >= 600:
            promised, accepted = promised + said, accepted + len(nodes) - 1
    # One of eight children at most is right, so what was said was eight times too much.
    assert promised == pytest.approx(accepted, rel=0.35)
    assert (np.diff(model.maps) > 0).all()
    first = model.reliability()[0]
    assert (first.is_sampled, first.depth) == (False, 1)
    assert np.average(first.calibrated, weights=first.num_seen) == pytest.approx(
        np.average(first.happened, weights=first.num_seen), abs=0.06
    )


def test_kinds_are_apart() -> None:
    model, rng = ValueModel(), random.Random(1)
    (tree,) = build_trees(tables_of(rng, 1), [0], max_nodes=[9], max_depths=[4])
    for _ in range(200):
        model.observe([tree], [[0]], [1])
    (table,) = tables_of(rng, 1)
    greedy, sampled = model.calibrate([table, table], [0, 1])
    assert greedy is not None and sampled is not None
    assert torch.equal(greedy.scores, table.scores)
    assert sampled.scores[0].float().mean() < table.scores[0].float().mean()
