"""Times `build_tree` and `lay_out_rows` beside their definition, a heap in Python.

Run as ``PYTHONPATH=.:kernels python kernels/benchmarks/build_tree.py --output DIR``. The op's test is run first. On a
CPU the definition is what serves, so there both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from measuring import Row, median_us, run

from jetflow_kernels.build_tree import (
    Candidates,
    RowLayout,
    TreeBuffers,
    TreeLimits,
    build_tree,
    build_tree_reference,
    lay_out_rows,
)

DEPTH, WIDTH, TILE_ROWS, PAGE_SIZE, CONTEXT = 15, 16, 16, 16, 1024
#: Requests, and most nodes of each; the trees share half of the rows that all would have.
CASES = ((1, 16), (1, 128), (8, 64), (64, 16))


def measure(num_requests: int, num_nodes: int, device: str, bandwidth: float) -> Row:
    """One row of the table: conditional scores and a price. Raises AssertionError where the two disagree."""
    torch.manual_seed(0)
    num_rows = max(num_requests, num_requests * num_nodes // (2 if num_requests > 1 else 1))
    logits = torch.randn(num_requests, DEPTH, WIDTH, WIDTH) * 2
    scores = (logits.log_softmax(-1).sort(-1, descending=True).values * 2**16).round().to(torch.int32)
    candidates = Candidates(
        ids=torch.randint(0, 32_000, (num_requests, DEPTH, WIDTH)).to(device), scores=scores.to(device)
    )
    limits = TreeLimits(
        anchor_ids=torch.arange(num_requests, device=device),
        requests=torch.tensor([[num_nodes, DEPTH, WIDTH, 0]] * num_requests, dtype=torch.int32, device=device),
        budget=torch.tensor([num_rows], dtype=torch.int32, device=device),
        cost=20_000 + 20 * torch.arange(num_rows + 1, device=device),
        value_table=torch.tensor([round(2**24 * math.exp(-i / 256)) for i in range(24 * 256)], device=device),
    )
    sizes = {"num_requests": num_requests, "num_nodes": num_nodes, "num_rows": num_rows}
    where = {"device": torch.device(device)}
    found, expected = (
        TreeBuffers.allocate(**sizes, num_depths=DEPTH, width=WIDTH, is_conditional=True, **where) for _ in range(2)
    )
    rows = RowLayout.allocate(**sizes, tile_rows=TILE_ROWS, **where)
    num_pages = (CONTEXT + num_nodes) // PAGE_SIZE + 1
    table = torch.arange(num_requests * num_pages, dtype=torch.int32, device=device).view(num_requests, num_pages)
    context = torch.full((num_requests,), CONTEXT, dtype=torch.int32, device=device)

    def lay_out() -> None:
        lay_out_rows(
            found, rows, context_lens=context, page_table=table, page_size=PAGE_SIZE, pad_slot=0, tile_rows=TILE_ROWS
        )

    build_tree(candidates, limits, found)
    build_tree_reference(candidates, limits, expected)
    assert torch.equal(found.counts, expected.counts), "the trees' sizes differ from the definition"
    for r, count in enumerate(expected.counts.tolist()):
        assert torch.equal(found.token_ids[r, :count], expected.token_ids[r, :count]), "the trees differ"
        assert torch.equal(found.parents[r, :count], expected.parents[r, :count]), "the trees differ"
    ours_us = median_us(lambda: build_tree(candidates, limits, found), device)
    theirs_us = median_us(lambda: build_tree_reference(candidates, limits, expected), device, 3)
    return {
        "requests": num_requests,
        "nodes": num_nodes,
        "taken": int(found.counts.sum()),
        "build_tree_us": ours_us,
        "lay_out_rows_us": median_us(lay_out, device),
        "share_of_copy_bandwidth": (candidates.ids.nbytes + candidates.scores.nbytes) / (ours_us * 1e-6) / bandwidth,
        "reference_us": theirs_us,
        "ratio_to_reference": ours_us / theirs_us,
    }


def rows_on(device: str, bandwidth: float) -> Iterator[Row]:
    """The whole table."""
    for num_requests, num_nodes in CASES:
        yield measure(num_requests, num_nodes, device, bandwidth)


if __name__ == "__main__":
    run("build_tree", rows_on, __doc__ or "")
