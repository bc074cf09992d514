"""Times `accept_tree` beside its definition, one node at a time, and beside the argmax of all rows alone.

Run as ``PYTHONPATH=.:kernels python kernels/benchmarks/accept_tree.py --output DIR``. The op's test is run first. On a
CPU the definition is what serves, so there both are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from measuring import Row, median_us, run

from jetflow_kernels.accept_tree import SamplingTable, VerifiedTrees, WalkBuffers, accept_tree, accept_tree_reference

#: Words of the vocabulary: the embedded model's on a CPU, those of Qwen3 on a GPU.
VOCAB_SIZE = {"cpu": 4096, "cuda": 151_936}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
#: Requests, nodes of each, accepted ones, and whether they sample with filters.
CASES = ((1, 16, 5, False), (1, 128, 8, False), (8, 64, 6, False), (8, 64, 6, True), (64, 8, 3, False))


def measure(
    num_requests: int, num_nodes: int, num_accepted: int, is_filtered: bool, device: str, bandwidth: float
) -> Row:
    """One row of the table: chains whose first tokens are right. Raises AssertionError where the two disagree."""
    torch.manual_seed(0)
    vocab_size, num_rows = VOCAB_SIZE[device], num_requests * num_nodes
    logits = torch.randn(num_rows, vocab_size)
    ids = torch.randint(0, vocab_size, (num_requests, num_nodes), dtype=torch.int32)
    for r in range(num_requests):
        for i in range(num_accepted - 1):
            # By so much the best that no noise turns it over.
            logits[r * num_nodes + i, ids[r, i + 1]] = 1000.0
    trees = VerifiedTrees(
        token_ids=ids.to(device),
        parents=(torch.arange(num_nodes, dtype=torch.int32) - 1).repeat(num_requests, 1).to(device),
        counts=torch.full((num_requests,), num_nodes, dtype=torch.int32, device=device),
        first_rows=torch.arange(0, num_rows, num_nodes, dtype=torch.int32, device=device),
        logits=logits.to(device, DTYPES[device]),
    )
    where = {"num_requests": num_requests, "device": torch.device(device)}
    table = None
    if is_filtered:
        made = SamplingTable.allocate(num_changed=0, num_barred=0, has_changes=False, has_filters=True, **where)
        factors = made.factors.clone()
        factors[:, 0], factors[:, 1] = 0.8, 0.95
        table = replace(made, factors=factors)
    found, expected = (
        WalkBuffers.allocate(
            num_levels=num_nodes, num_rows=num_rows, vocab_size=vocab_size, is_processed=is_filtered, **where
        )
        for _ in range(2)
    )
    accept_tree(trees, table, found)
    accept_tree_reference(trees, table, expected)
    assert torch.equal(found.lengths, expected.lengths), "the walks differ from the definition"
    for r, length in enumerate(expected.lengths.tolist()):
        assert length >= num_accepted
        assert torch.equal(found.token_ids[r, :length], expected.token_ids[r, :length]), "the walks differ"
    ours_us = median_us(lambda: accept_tree(trees, table, found), device)
    theirs_us = median_us(lambda: accept_tree_reference(trees, table, expected), device, 3)
    # Greedy walks read every row; others those that they reach.
    num_read = num_rows if table is None else num_requests * num_accepted
    return {
        "requests": num_requests,
        "nodes": num_nodes,
        "accepted": num_accepted,
        "filtered": int(is_filtered),
        "accept_tree_us": ours_us,
        "share_of_copy_bandwidth": num_read * trees.logits[0].nbytes / (ours_us * 1e-6) / bandwidth,
        "argmax_us": median_us(lambda: trees.logits.argmax(-1), device),
        "reference_us": theirs_us,
        "ratio_to_reference": ours_us / theirs_us,
    }


def rows_on(device: str, bandwidth: float) -> Iterator[Row]:
    """The whole table."""
    for case in CASES:
        yield measure(*case, device, bandwidth)


if __name__ == "__main__":
    run("accept_tree", rows_on, __doc__ or "")
