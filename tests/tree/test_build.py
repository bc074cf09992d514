"""Trees equal brute force: all prefixes enumerated and sorted by the rule of ties."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from jetflow_cluster.tree.build import CandidateTable, build_trees, to_fixed_point
from jetflow_cluster.tree.draft_tree import DraftTree

pytestmark = pytest.mark.usefixtures("grown_by")


def random_table(rng: random.Random, depth: int, width: int, *, conditional: bool, spread: int) -> CandidateTable:
    """Scores in [-spread, 0], so that a small spread gives many ties; token ids repeat."""
    num_parents = width if conditional else 1
    scores = [[[-rng.randint(0, spread) for _ in range(width)] for _ in range(num_parents)] for _ in range(depth)]
    ids = [[rng.randint(0, 9) for _ in range(width)] for _ in range(depth)]
    return CandidateTable(ids=torch.tensor(ids), scores=torch.tensor(scores, dtype=torch.int32))


def all_prefixes(table: CandidateTable, max_depth: int) -> list[tuple[int, tuple[int, ...]]]:
    """Every prefix as (cumulative score, ranks)."""
    num_depths, num_parents, width = table.scores.shape
    prefixes = []
    for depth in range(1, min(num_depths, max_depth) + 1):
        for ranks in itertools.product(range(width), repeat=depth):
            parents = (0, *ranks[:-1])
            score = sum(
                int(table.scores[d, parents[d] if num_parents > 1 else 0, rank]) for d, rank in enumerate(ranks)
            )
            prefixes.append((score, ranks))
    return prefixes


def brute_force(
    tables: Sequence[CandidateTable | None],
    anchors: Sequence[int],
    max_nodes: Sequence[int],
    max_depths: Sequence[int],
    verify_budget: int | None,
) -> list[DraftTree]:
    """The best prefixes over all requests, by score, lower depth, ranks, request."""
    entries = [
        (-score, len(ranks), ranks, r)
        for r, table in enumerate(tables)
        if table is not None
        for score, ranks in all_prefixes(table, max_depths[r])
    ]
    trees = [DraftTree.root_only(anchor) for anchor in anchors]
    index: list[dict[tuple[int, ...], int]] = [{(): 0} for _ in anchors]
    left = len(entries) if verify_budget is None else verify_budget - len(anchors)
    for negated, depth, ranks, r in sorted(entries):
        tree = trees[r]
        if left > 0 and tree.num_nodes < max_nodes[r]:
            left -= 1
            index[r][ranks] = tree.num_nodes
            tree.token_ids.append(int(tables[r].ids[depth - 1, ranks[-1]]))
            tree.parents.append(index[r][ranks[:-1]])
            tree.depths.append(depth)
            tree.scores.append(-negated)
    return trees


@pytest.mark.parametrize("conditional", [False, True], ids=["marginal", "conditional"])
@pytest.mark.parametrize("spread", [0, 1, 3, 1000])
@pytest.mark.parametrize("depth, width", [(1, 1), (1, 5), (2, 4), (3, 3), (4, 2), (5, 1)])
def test_one_request_equals_brute_force(depth, width, spread, conditional):
    rng = random.Random(f"{depth} {width} {spread} {conditional}")
    for _ in range(4):
        table = random_table(rng, depth, width, conditional=conditional, spread=spread)
        for nodes, max_depth in itertools.product((1, 2, 5, 11, 1000), (0, 1, 2, 99)):
            case = ([table], [77], [nodes], [max_depth], None)
            built = build_trees(case[0], case[1], max_nodes=case[2], max_depths=case[3])
            assert built == brute_force(*case)
            built[0].validate()


@pytest.mark.parametrize("spread", [0, 2, 40])
@pytest.mark.parametrize("case", range(12))
def test_shared_budget_equals_brute_force(case, spread):
    rng = random.Random(f"{case} {spread}")
    num_requests = rng.randint(1, 5)
    tables = [
        None
        if rng.random() < 0.2
        else random_table(rng, rng.randint(1, 3), rng.randint(1, 3), conditional=rng.random() < 0.5, spread=spread)
        for _ in range(num_requests)
    ]
    anchors = [rng.randint(0, 9) for _ in tables]
    max_nodes = [rng.choice((1, 2, 4, 9, 60)) for _ in tables]
    max_depths = [rng.choice((0, 1, 2, 3, 7)) for _ in tables]
    for budget in (None, num_requests, num_requests + 1, num_requests + 5, num_requests + 17, 1000):
        built = build_trees(tables, anchors, max_nodes=max_nodes, max_depths=max_depths, verify_budget=budget)
        assert built == brute_force(tables, anchors, max_nodes, max_depths, budget)
        assert sum(tree.num_nodes for tree in built) <= (budget or 10**9)


def test_ties_go_to_lower_depth_then_rank_then_request():
    flat = CandidateTable(ids=torch.tensor([[10, 11], [20, 21]]), scores=torch.zeros(2, 1, 2, dtype=torch.int32))
    trees = build_trees([flat, flat], [1, 2], max_nodes=[99, 99], max_depths=[9, 9], verify_budget=2 + 5)
    # Depth 1, rank 0 of both, rank 1 of both, then depth 2 of the first.
    assert trees[0].token_ids == [1, 10, 11, 20]
    assert trees[0].parents == [-1, 0, 0, 1]
    assert trees[1].token_ids == [2, 10, 11]


@pytest.mark.parametrize("conditional", [False, True], ids=["marginal", "conditional"])
def test_prefix_of_the_nodes_is_the_smaller_tree(conditional):
    rng = random.Random(3)
    for spread in (2, 100_000):
        table = random_table(rng, 7, 16, conditional=conditional, spread=spread)
        largest = build_trees([table], [5], max_nodes=[64], max_depths=[7])[0]
        assert largest.num_nodes == 64
        assert largest.scores == sorted(largest.scores, reverse=True)
        for nodes in range(1, 64):
            tree = build_trees([table], [5], max_nodes=[nodes], max_depths=[7])[0]
            for name in ("token_ids", "parents", "depths", "scores"):
                assert getattr(tree, name) == getattr(largest, name)[:nodes]


def test_budget_below_the_roots_is_refused():
    with pytest.raises(ValueError, match="verify_budget = 1"):
        build_trees([None, None], [1, 2], max_nodes=[1, 1], max_depths=[0, 0], verify_budget=1)


@pytest.mark.parametrize(
    "ids, scores",
    [
        pytest.param((2, 3), (2, 2, 3), id="parents"),
        pytest.param((2, 3), (3, 1, 3), id="depths"),
        pytest.param((2, 3), (2, 1, 4), id="width"),
        pytest.param((6,), (2, 1, 3), id="flat-ids"),
    ],
)
def test_table_shapes_are_checked(ids, scores):
    with pytest.raises(ValueError, match="shape"):
        CandidateTable(ids=torch.zeros(ids, dtype=torch.int64), scores=torch.zeros(scores, dtype=torch.int32))


@pytest.mark.parametrize(
    "logprob, fixed",
    [
        pytest.param(0.0, 0, id="certain"),
        pytest.param(-1.0, -65536, id="one-nat"),
        pytest.param(-1.4 / 65536, -1, id="down"),
        pytest.param(-1.6 / 65536, -2, id="up"),
        pytest.param(1e-3, 0, id="above-zero"),
        pytest.param(-255.99, round(-255.99 * 65536), id="near-the-floor"),
        pytest.param(-300.0, -(2**24), id="floor"),
        pytest.param(float("-inf"), -(2**24), id="impossible"),
        pytest.param(float("nan"), -(2**24), id="nan"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_point(logprob, fixed, dtype):
    result = to_fixed_point(torch.tensor([logprob], dtype=dtype))
    assert result.dtype == torch.int32
    assert abs(result.item() - fixed) <= (1 if logprob == -255.99 else 0)


def test_deepest_cumulative_score_fits_int32():
    floor = to_fixed_point(torch.full((64, 1, 1), -1e9))
    table = CandidateTable(ids=torch.zeros(64, 1, dtype=torch.int64), scores=floor)
    tree = build_trees([table], [0], max_nodes=[65], max_depths=[64])[0]
    assert tree.num_nodes == 65
    assert tree.scores[-1] >= -(2**31)
