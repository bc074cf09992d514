"""With a price, the trees hold the set of nodes with the most expected tokens per cost: brute force over all sets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from jetflow_cluster.tree.build import (
    SCORE_UNIT,
    VALUE_SHIFT,
    VALUE_TABLE,
    VALUE_UNIT,
    CandidateTable,
    build_trees,
)
from jetflow_cluster.tree.draft_tree import DraftTree

pytestmark = pytest.mark.usefixtures("grown_by")

Path = tuple[int, ...]


def table_of(rng: random.Random, depth: int, width: int, *, conditional: bool, nats: float) -> CandidateTable:
    shape = (depth, width if conditional else 1, width)
    scores = [
        [[-int(rng.random() * nats * SCORE_UNIT) for _ in range(width)] for _ in range(shape[1])] for _ in range(depth)
    ]
    ids = torch.arange(depth * width).view(depth, width)
    return CandidateTable(ids=ids, scores=torch.tensor(scores, dtype=torch.int32))


def value(score: int) -> int:
    return VALUE_TABLE[min(-min(score, 0) >> VALUE_SHIFT, len(VALUE_TABLE) - 1)]


def paths_of(table: CandidateTable, max_depth: int) -> dict[Path, int]:
    """Score of every path."""
    found: dict[Path, int] = {}
    num_depths, num_parents, width = table.scores.shape
    for depth in range(1, min(num_depths, max_depth) + 1):
        for ranks in itertools.product(range(width), repeat=depth):
            above = (0, *ranks[:-1])
            found[ranks] = sum(
                int(table.scores[d, above[d] if num_parents > 1 else 0, rank]) for d, rank in enumerate(ranks)
            )
    return found


def closed_sets(nodes: list[tuple[int, Path]], caps: list[int]) -> Iterator[tuple[tuple[int, Path], ...]]:
    """All sets of nodes that hold the parents of their nodes and no more per request than allowed."""
    for size in range(len(nodes) + 1):
        for chosen in itertools.combinations(nodes, size):
            held = set(chosen)
            if all(len(path) == 1 or (r, path[:-1]) in held for r, path in chosen) and all(
                sum(1 for r, _ in chosen if r == i) < cap for i, cap in enumerate(caps)
            ):
                yield chosen


def random_costs(rng: random.Random, kind: str, length: int) -> np.ndarray:
    """Of any shape, as a device's steps are: with jumps, level stretches, and no convexity."""
    steps = {
        "level": lambda: 0,
        "linear": lambda: 400,
        "jumps": lambda: rng.choice((0, 0, 0, 3000)),
        "any": lambda: rng.randrange(1500),
    }[kind]
    return np.cumsum([rng.randrange(1, 4000)] + [steps() for _ in range(length)]).astype(np.int64)


@pytest.mark.parametrize("kind", ["level", "linear", "jumps", "any"])
@pytest.mark.parametrize("case", range(8))
def test_no_set_of_nodes_is_better(kind: str, case: int) -> None:
    rng = random.Random(f"{kind} {case}")
    num_requests = rng.choice((1, 2))
    shape = (2, 2) if num_requests == 2 else rng.choice(((3, 2), (2, 3)))
    tables = [table_of(rng, *shape, conditional=rng.random() < 0.5, nats=2.5) for _ in range(num_requests)]
    biases = [rng.choice((0, 0, 40_000, -50_000)) for _ in tables]
    caps = [rng.choice((3, 99)) for _ in tables]
    scores = {(r, p): s + biases[r] for r, t in enumerate(tables) for p, s in paths_of(t, 9).items()}
    nodes = list(scores)
    costs = random_costs(rng, kind, num_requests + len(nodes) + 4)
    built = build_trees(
        tables,
        [0] * num_requests,
        max_nodes=caps,
        max_depths=[9] * num_requests,
        verify_budget=num_requests + len(nodes),
        biases=biases,
        row_costs=costs,
    )

    def rate(values: list[int]) -> tuple[int, int]:
        return num_requests * VALUE_UNIT + sum(values), int(costs[num_requests + len(values)])

    found, cost = rate([value(s + b) for tree, b in zip(built, biases, strict=True) for s in tree.scores[1:]])
    for chosen in closed_sets(nodes, caps):
        other, other_cost = rate([value(scores[node]) for node in chosen])
        assert other * cost <= found * other_cost, chosen


def rows(trees: list[DraftTree]) -> int:
    return sum(tree.num_nodes for tree in trees)


@pytest.mark.parametrize("case", range(20))
def test_the_best_prefix_of_the_trees_without_a_price(case: int) -> None:
    rng = random.Random(case)
    num_requests = rng.randint(1, 12)
    tables = [
        None
        if rng.random() < 0.2
        else table_of(rng, 7, 8, conditional=rng.random() < 0.5, nats=rng.choice((0.01, 4.0)))
        for _ in range(num_requests)
    ]
    caps = [rng.choice((1, 5, 40)) for _ in tables]
    biases = [rng.choice((0, -30_000, 45_000)) for _ in tables]
    costs = random_costs(rng, rng.choice(("linear", "jumps", "any")), 700)

    def built(budget: int, **price: np.ndarray) -> list[DraftTree]:
        return build_trees(
            tables,
            list(range(num_requests)),
            max_nodes=caps,
            max_depths=[7] * num_requests,
            verify_budget=budget,
            biases=biases,
            **price,
        )

    best, best_value, best_cost = built(num_requests), num_requests * VALUE_UNIT, int(costs[num_requests])
    for budget in range(num_requests + 1, num_requests + 200):
        trees = built(budget)
        if rows(trees) < budget:
            break
        total = sum(value(s + b) for tree, b in zip(trees, biases, strict=True) for s in tree.scores[1:])
        total += num_requests * VALUE_UNIT
        if total * best_cost > best_value * int(costs[budget]):
            best, best_value, best_cost = trees, total, int(costs[budget])
    assert built(num_requests + 199, row_costs=costs) == best


@pytest.mark.parametrize("nats, expected", [(0.0, 15), (0.7, 2), (9.0, 1)], ids=["certain", "doubtful", "hopeless"])
def test_members_of_the_choice(nats: float, expected: int) -> None:
    """A chain of sure guesses is taken whole; where a row costs nearly a step, nothing else pays."""
    scores = torch.full((14, 1, 1), -int(nats * SCORE_UNIT), dtype=torch.int32)
    table = CandidateTable(ids=torch.zeros(14, 1, dtype=torch.int64), scores=scores)
    costs = np.arange(1, 80, dtype=np.int64) * 900 + 500
    (tree,) = build_trees([table], [1], max_nodes=[64], max_depths=[64], row_costs=costs)
    assert tree.num_nodes == expected


def test_a_bias_moves_nodes_between_requests_and_not_within_one() -> None:
    rng = random.Random(8)
    tables = [table_of(rng, 4, 4, conditional=True, nats=3.0) for _ in range(2)]

    def built(bias: int, budget: int = 20) -> list[DraftTree]:
        return build_trees(
            tables, [0, 0], max_nodes=[64, 64], max_depths=[4, 4], verify_budget=budget, biases=[bias, 0]
        )

    plain, favoured = built(0), built(2 * SCORE_UNIT)
    assert favoured[0].num_nodes > plain[0].num_nodes
    assert favoured[0].scores[: plain[0].num_nodes] == plain[0].scores
    assert favoured[1].token_ids == plain[1].token_ids[: favoured[1].num_nodes]


def test_costs_must_cover_the_budget() -> None:
    table = table_of(random.Random(1), 3, 3, conditional=False, nats=1.0)
    with pytest.raises(ValueError, match="row_costs for 3 rows"):
        build_trees([table], [0], max_nodes=[9], max_depths=[3], row_costs=np.arange(1, 5))


def test_values_are_fixed() -> None:
    assert (VALUE_TABLE[0], VALUE_TABLE[256], len(VALUE_TABLE)) == (2**24, 6171993, 6144)
    assert list(VALUE_TABLE) == sorted(VALUE_TABLE, reverse=True)
