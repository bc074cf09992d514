"""The Triton kernels against the definition and the CPU's trees; see `test_interpreted.py` for how these run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from jetflow_cluster.engine.device_builder import build_trees_on_device
from jetflow_cluster.tree.build import CandidateTable, build_trees
from jetflow_cluster.tree.mask import packed_ancestor_mask
from jetflow_kernels.build_tree import (
    TreeLimits,
    build_tree,
    build_tree_reference,
    lay_out_rows,
    lay_out_rows_reference,
)
from jetflow_kernels.tree_attention import plan_tree_attention
from jetflow_kernels.tree_attention.metadata import Capacity, TreeAttentionMetadata
from support.tree_tables import TableCase, assert_same_trees, make_layout, make_tables


def compare(case: TableCase, device: str) -> None:
    expected, moved = case.buffers(), case.to(device)
    build_tree_reference(case.candidates, case.limits, expected)
    built = case.buffers(device)
    build_tree(moved.candidates, moved.limits, built)
    assert_same_trees(built, expected)


@pytest.mark.parametrize("is_priced", [False, True], ids=["unpriced", "priced"])
@pytest.mark.parametrize("spread", [0, 1, 3, 100_000])
def test_random_tables(spread: int, is_priced: bool, device: str) -> None:
    rng = random.Random(f"{spread} {is_priced}")
    for _ in range(4):
        num_requests, width = rng.randint(1, 4), rng.choice((1, 2, 3, 5, 16))
        case = make_tables(
            rng,
            num_requests=num_requests,
            num_depths=rng.choice((1, 2, 3, 7, 17)),
            width=width,
            is_conditional=width > 1 and rng.random() < 0.5,
            spread=spread,
            num_nodes=rng.choice((1, 3, 8, 20)),
            budget=num_requests + rng.choice((0, 1, 5, 17, 40)),
            is_priced=is_priced,
        )
        compare(case, device)


@pytest.mark.parametrize("num_depths", [15, 24, 64])
def test_equal_scores_at_all_depths(num_depths: int, device: str) -> None:
    """Nothing but depths, ranks and requests decides."""
    rng = random.Random(num_depths)
    shape = {"num_requests": 3, "num_depths": num_depths, "width": 2, "is_conditional": True, "num_nodes": 24}
    case = make_tables(rng, **shape, spread=0, budget=45)
    requests = torch.tensor([[24, 64, 2, 0], [24, 64, 1, 0], [24, 64, 2, -1]], dtype=torch.int32)
    limits = TreeLimits(anchor_ids=case.limits.anchor_ids, requests=requests, budget=case.limits.budget)
    compare(TableCase(candidates=case.candidates, limits=limits, num_nodes=24, num_rows=45), device)


def test_more_requests_than_one_block(device: str) -> None:
    rng = random.Random(5)
    shape = {"num_requests": 66, "num_depths": 1, "width": 2, "is_conditional": True, "num_nodes": 3}
    compare(make_tables(rng, **shape, spread=2, budget=120, is_priced=True), device)


def test_no_request(device: str) -> None:
    rng = random.Random(6)
    shape = {"num_requests": 0, "num_depths": 2, "width": 2, "is_conditional": False, "num_nodes": 3}
    compare(make_tables(rng, **shape, spread=2, budget=5), device)


@pytest.mark.parametrize("is_priced", [False, True], ids=["unpriced", "priced"])
@pytest.mark.parametrize("spread", [0, 2, 100_000])
def test_trees_equal_those_of_the_cpu(spread: int, is_priced: bool, device: str) -> None:
    """Tables of different shapes, with biases, as an engine gives them."""
    rng = random.Random(f"{spread} {is_priced}")
    for _ in range(4):
        num_requests = rng.randint(1, 5)
        tables = [None if rng.random() < 0.2 else make_table(rng, spread) for _ in range(num_requests)]
        arguments = {
            "max_nodes": [rng.choice((1, 2, 9, 14)) for _ in tables],
            "max_depths": [rng.choice((0, 1, 3, 30)) for _ in tables],
            "verify_budget": rng.choice((None, num_requests, num_requests + 3, num_requests + 20)),
            "biases": rng.choice((None, [rng.choice((0, -3, 5, 90_000)) for _ in tables])),
            "row_costs": (40 + np.cumsum([rng.choice((0, 1, 9)) for _ in range(99)])) if is_priced else None,
        }
        anchors = [rng.randint(0, 99) for _ in tables]
        built = build_trees_on_device(tables, anchors, **arguments, device=torch.device(device))
        assert built == build_trees(tables, anchors, **arguments)


def make_table(rng: random.Random, spread: int) -> CandidateTable:
    depth, width = rng.randint(1, 5), rng.choice((1, 2, 4))
    shape = (depth, rng.choice((1, width)), width)
    scores = [-rng.randint(0, spread) for _ in range(torch.Size(shape).numel())]
    ids = torch.randint(0, 9, (depth, width), generator=torch.Generator().manual_seed(rng.randrange(99)))
    return CandidateTable(ids=ids, scores=torch.tensor(scores, dtype=torch.int32).view(shape))


@pytest.mark.parametrize("num_nodes", [5, 40])
def test_rows(num_nodes: int, device: str) -> None:
    rng = random.Random(num_nodes)
    shape = {"num_requests": 4, "num_depths": 5, "width": 3, "is_conditional": False, "num_nodes": num_nodes}
    case = make_tables(rng, **shape, spread=3, budget=100).to(device)
    trees = case.buffers(device)
    build_tree(case.candidates, case.limits, trees)
    context_lens = torch.tensor([0, 3, 4, 17], dtype=torch.int32, device=device)
    page_table = torch.randperm(4 * 24, dtype=torch.int32).view(4, 24).to(device)
    arguments = {"context_lens": context_lens, "page_table": page_table, "page_size": 4}
    numbers = {"pad_slot": 999, "tile_rows": 4}
    laid_out, expected = make_layout(trees, 4), make_layout(trees, 4)
    lay_out_rows(trees, laid_out, **arguments, **numbers)
    lay_out_rows_reference(trees, expected, **arguments, **numbers)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(laid_out, name), value), name
    # And as attention's own plan has it.
    counts = trees.counts.tolist()
    present = [r for r, count in enumerate(counts) if count]
    parents = [trees.parents[r, : counts[r]] for r in present]
    plan = plan_tree_attention(
        query_lens=[counts[r] for r in present],
        context_lens=[int(context_lens[r]) for r in present],
        page_table=page_table[present],
        parents=torch.cat(parents),
        page_size=4,
        is_chain=[False] * len(present),
    )
    num_words = expected.ancestor_bits.shape[1]
    capacity = Capacity(num_tiles=99, num_requests=4, num_rows=100, num_pages=24, num_words=num_words)
    metadata = TreeAttentionMetadata.allocate(capacity, tile_rows=4, num_splits=1, device=torch.device(device))
    metadata.fill(plan)
    assert torch.equal(laid_out.ancestor_bits, metadata.ancestor_bits)
    tiles = [(present[r] if r >= 0 else -1, max(first, 0)) for r, first in metadata.tiles.tolist() if r >= 0]
    assert [tuple(tile) for tile in laid_out.tiles.tolist() if tile[0] >= 0] == tiles
    assert laid_out.requests[present].tolist() == metadata.requests[: len(present)].tolist()
    for r in present:
        first, count = int(trees.row_start[r]), counts[r]
        bits = packed_ancestor_mask(trees.parents[r, :count].tolist())
        assert torch.equal(laid_out.ancestor_bits[first : first + count, : bits.shape[1]].cpu(), bits)


@pytest.mark.parametrize("change", ["requests", "depths"])
def test_what_does_not_fit_is_refused(change: str) -> None:
    rng = random.Random(0)
    shape = {"num_requests": 2, "num_depths": 3, "width": 2, "is_conditional": False, "num_nodes": 4, "spread": 3}
    case = make_tables(rng, **shape, budget=8)
    other = make_tables(rng, **shape | ({"num_requests": 3} if change == "requests" else {"num_depths": 2}), budget=8)
    with pytest.raises(ValueError, match="do not fit"):
        build_tree(case.candidates, case.limits, other.buffers())
