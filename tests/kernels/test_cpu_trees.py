"""Compiled tree growth and calibration give what the Python beside them gives, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from jetflow_cluster.engine import value_model
from jetflow_cluster.engine.value_model import KNOT_SHIFT, NUM_DEPTHS, NUM_KNOTS, ValueModel
from jetflow_cluster.tree import build
from jetflow_cluster.tree.build import MIN_SCORE, CandidateTable, build_trees
from jetflow_kernels.cpu import cpu_kernels, trees

pytestmark = pytest.mark.skipif(cpu_kernels().functions is None, reason="no compiled CPU kernels")


def _table(rng: random.Random, *, spread: int) -> CandidateTable:
    depth, width = rng.randint(1, 9), rng.randint(1, 16)
    num_parents = width if rng.random() < 0.7 else 1
    draw = np.random.default_rng(rng.randrange(2**32))
    scores = -draw.integers(0, spread, (depth, num_parents, width), endpoint=True)
    return CandidateTable(
        ids=torch.from_numpy(draw.integers(0, 50000, (depth, width))),
        scores=torch.from_numpy(scores.astype(np.int32)),
    )


@pytest.mark.parametrize("spread", [0, 1, 7, 1 << 14, 1 << 18])
@pytest.mark.parametrize("num", [1, 2, 9, 64])
def test_trees_are_those_of_python(num: int, spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, roots alone, biases, shared budgets and prices of every shape."""
    rng = random.Random(f"{num} {spread}")
    for _ in range(12):
        tables = [None if rng.random() < 0.1 else _table(rng, spread=spread) for _ in range(num)]
        max_nodes = [rng.choice([1, 2, 8, 33]) for _ in range(num)]
        budget = rng.randint(num, sum(max_nodes) + 3)
        steps = [rng.choice([0, 1, 5, 400]) for _ in range(budget + 1)]
        case = {
            "max_nodes": max_nodes,
            "max_depths": [rng.choice([0, 1, 3, 99]) for _ in range(num)],
            "verify_budget": budget,
            "biases": [rng.choice([0, -5, 1 << 15]) for _ in range(num)],
            "row_costs": None if rng.random() < 0.3 else 100 + np.cumsum(steps),
        }
        anchors = [rng.randrange(9) for _ in range(num)]
        found = build_trees(tables, anchors, **case)
        with monkeypatch.context() as patched:
            patched.setattr(build, "grow_trees", lambda *tables, **limits: None)
            assert found == build_trees(tables, anchors, **case)


def test_tables_that_are_parts_of_others() -> None:
    whole = _table(random.Random(3), spread=1 << 16)
    part = CandidateTable(ids=whole.ids[::2], scores=whole.scores[::2])
    copied = CandidateTable(ids=part.ids.clone(), scores=part.scores.clone())
    limits = {"max_nodes": [20], "max_depths": [9]}
    assert build_trees([part], [1], **limits) == build_trees([copied], [1], **limits)


def test_what_is_too_deep_too_much_or_of_another_dtype_is_left_to_python() -> None:
    deep = torch.zeros(129, 2, dtype=torch.int64), torch.zeros(129, 1, 2, dtype=torch.int32)
    limits = {"num_left": [5], "max_depths": [200], "total_left": 5, "biases": [0], "costs": None}
    assert trees.grow_trees([deep], [0], **limits, values=build._VALUES) is None
    for ids, scores in ((torch.int32, torch.int32), (torch.int64, torch.int64)):
        other = torch.zeros(2, 3, dtype=ids), torch.zeros(2, 1, 3, dtype=scores)
        assert trees.grow_trees([other], [0], **limits, values=build._VALUES) is None
    table = CandidateTable(ids=torch.arange(6).view(2, 3), scores=torch.zeros(2, 1, 3, dtype=torch.int32))
    (tree,) = build_trees([table], [0], max_nodes=[10**9], max_depths=[9])
    assert tree.num_nodes == 1 + 3 + 9


@pytest.mark.parametrize("hostile", [False, True], ids=["maps", "maps that are none"])
def test_scores_are_mapped_as_python_maps_them(hostile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, draw = random.Random(5), np.random.default_rng(5)
    model = ValueModel()
    low, high = (-(1 << 15), 1 << 15) if hostile else (1 << 10, 1 << 15)
    model.maps = np.cumsum(draw.integers(low, high, (2, NUM_DEPTHS, NUM_KNOTS)), -1).astype(np.int32)
    tables: list[CandidateTable | None] = [None]
    for spread in (0, 1 << KNOT_SHIFT, 1 << 20, -MIN_SCORE):
        tables += [_table(rng, spread=spread) for _ in range(5)]
    kinds = [rng.randrange(2) for _ in tables]
    found = model.calibrate(tables, kinds)
    monkeypatch.setattr(value_model, "map_scores", lambda *scores, **limits: None)
    for one, other in zip(found, model.calibrate(tables, kinds), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.scores, other.scores) and torch.equal(one.ids, other.ids)
