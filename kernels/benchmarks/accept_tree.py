"""Times `accept_tree`, as one CUDA graph, beside the walk of the CPU, on trees whose first four levels are right.

Run as ``PYTHONPATH=.:kernels python kernels/benchmarks/accept_tree.py --output DIR``. The op's test is run first.
"""

from __future__ import annotations

from itertools import product

import torch
from device_timing import Row, host_us, replay_us, run

from jetflow_cluster.layers.sampler import SamplingRow, TokenCounts, choose_tokens
from jetflow_cluster.layers.walk_table import WalkSampling, sampling_table
from jetflow_cluster.tree.accept import accept_trees
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import SamplingParams
from jetflow_kernels.accept_tree import VerifiedTrees, WalkBuffers, accept_tree

VOCAB_SIZE, NUM_DEPTHS, NUM_RIGHT = 151_936, 15, 4
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "everything": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 0.5},
}


def measure_one(name: str, num_requests: int, num_nodes: int) -> Row:
    """One row of the table."""
    params = SamplingParams(**OPTIONS[name])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_requests * num_nodes, VOCAB_SIZE, generator=generator).mul_(3).bfloat16()
    counts = TokenCounts(list(range(1000)), list(range(500)))
    first_rows = [r * num_nodes for r in range(num_requests)]

    def choose(walking: list[tuple[int, int, list[int]]]) -> list[int]:
        rows = [
            SamplingRow(params=params, seed=r, position=1500 + len(path), counts=counts, path=path)
            for r, _, path in walking
        ]
        return choose_tokens(logits[[first_rows[r] + node for r, node, _ in walking]], rows)

    trees = [make_tree(r, num_nodes, choose) for r in range(num_requests)]
    samplings = [WalkSampling(params=params, seed=r, position=1500, counts=counts) for r in range(num_requests)]
    return {
        "options": name,
        "requests": num_requests,
        "nodes": num_nodes,
        "accepted": accept_trees(trees, choose)[0].num_accepted,
        "host_us": host_us(lambda: accept_trees(trees, choose), 7),
        "kernels_us": kernels_us(trees, samplings, first_rows, logits) if torch.cuda.is_available() else None,
    }


def make_tree(request: int, num_nodes: int, choose) -> DraftTree:
    """A chain of right guesses, then wrong ones below the root."""
    tokens, parents, depths = [0], [-1], [0]
    path: list[int] = []
    for i in range(1, num_nodes):
        is_right = i <= NUM_RIGHT
        if is_right:
            path.append(choose([(request, i - 1, list(path))])[0])
        tokens.append(path[-1] if is_right else VOCAB_SIZE - 1)
        parents.append(i - 1 if i <= NUM_DEPTHS else 0)
        depths.append(i if i <= NUM_DEPTHS else 1)
    return DraftTree(token_ids=tokens, parents=parents, depths=depths, scores=[0] * num_nodes)


def kernels_us(
    trees: list[DraftTree], samplings: list[WalkSampling], first_rows: list[int], logits: torch.Tensor
) -> float | None:
    """The kernels' time for the same walks."""
    device = torch.device("cuda")
    table = sampling_table(samplings, vocab_size=VOCAB_SIZE, device=device)

    def tensor(rows: list) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=device)

    verified = VerifiedTrees(
        token_ids=tensor([tree.token_ids for tree in trees]),
        parents=tensor([tree.parents for tree in trees]),
        counts=tensor([tree.num_nodes for tree in trees]),
        first_rows=tensor(first_rows),
        logits=logits.to(device),
    )
    out = WalkBuffers.allocate(
        num_requests=len(trees),
        num_levels=NUM_DEPTHS + 1,
        num_rows=logits.shape[0],
        vocab_size=VOCAB_SIZE,
        is_processed=table is not None and table.is_processed,
        device=device,
    )
    return replay_us(lambda: accept_tree(verified, table, out))


def measure() -> list[Row]:
    """All rows."""
    return [measure_one(name, r, n) for name, (r, n) in product(OPTIONS, ((1, 32), (1, 128), (8, 64)))]


if __name__ == "__main__":
    run("accept_tree", (__doc__ or "").splitlines()[0], measure)
