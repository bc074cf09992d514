"""Times `build_tree` and `lay_out_rows`, as one CUDA graph, beside the trees of the CPU.

Run as ``PYTHONPATH=.:kernels python kernels/benchmarks/build_tree.py --output DIR``. The op's test is run first.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from device_timing import Row, host_us, replay_us, run

from jetflow_cluster.tree.build import VALUE_TABLE, CandidateTable, build_trees
from jetflow_kernels.build_tree import Candidates, RowLayout, TreeBuffers, TreeLimits, build_tree, lay_out_rows

NUM_DEPTHS, WIDTH, PAGE_SIZE, TILE_ROWS = 15, 16, 16, 16


def measure_one(num_requests: int, num_nodes: int, *, is_priced: bool) -> Row:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_requests, NUM_DEPTHS, WIDTH, WIDTH)
    logprobs = torch.randn(shape, generator=generator).mul_(3).log_softmax(-1).sort(-1, descending=True).values
    scores = (logprobs * 2**16).round().clamp_(-(2**24), 0).to(torch.int32)
    ids = torch.randint(0, 150_000, shape[:3], generator=generator)
    num_rows = num_requests * num_nodes
    costs = 50_000 + 40 * np.arange(num_rows + 1, dtype=np.int64) if is_priced else None
    tables = [CandidateTable(ids=i, scores=s) for i, s in zip(ids, scores, strict=True)]

    def on_host() -> object:
        return build_trees(
            tables,
            [0] * num_requests,
            max_nodes=[num_nodes] * num_requests,
            max_depths=[NUM_DEPTHS] * num_requests,
            verify_budget=num_rows,
            row_costs=costs,
        )

    return {
        "requests": num_requests,
        "nodes": num_nodes,
        "priced": str(is_priced),
        "host_us": host_us(on_host),
        "kernels_us": kernels_us(ids, scores, num_nodes, costs) if torch.cuda.is_available() else None,
    }


def kernels_us(ids: torch.Tensor, scores: torch.Tensor, num_nodes: int, costs: np.ndarray | None) -> float | None:
    """The kernels' time for the same trees."""
    device, num_requests = torch.device("cuda"), ids.shape[0]
    num_rows = num_requests * num_nodes
    sizes = {"num_requests": num_requests, "num_nodes": num_nodes, "num_rows": num_rows, "device": device}
    trees = TreeBuffers.allocate(**sizes, num_depths=NUM_DEPTHS, width=WIDTH, is_conditional=True)
    rows = RowLayout.allocate(**sizes, tile_rows=TILE_ROWS)
    limits = TreeLimits(
        anchor_ids=torch.zeros(num_requests, dtype=torch.int64, device=device),
        requests=torch.tensor([[num_nodes, NUM_DEPTHS, WIDTH, 0]] * num_requests, dtype=torch.int32, device=device),
        budget=torch.tensor([num_rows], dtype=torch.int32, device=device),
        cost=None if costs is None else torch.from_numpy(costs).to(device),
        value_table=None if costs is None else torch.tensor(VALUE_TABLE, dtype=torch.int64, device=device),
    )
    candidates = Candidates(ids=ids.to(device), scores=scores.to(device))
    context_lens = torch.full((num_requests,), 100, dtype=torch.int32, device=device)
    page_table = torch.arange(num_requests * 64, dtype=torch.int32, device=device).view(num_requests, 64)

    def build() -> None:
        build_tree(candidates, limits, trees)
        lay_out_rows(
            trees,
            rows,
            context_lens=context_lens,
            page_table=page_table,
            page_size=PAGE_SIZE,
            pad_slot=0,
            tile_rows=TILE_ROWS,
        )

    return replay_us(build)


def measure() -> list[Row]:
    """All rows; trees of all requests fit the kernels' rows together."""
    cases = [(r, n, p) for r, n, p in product((1, 8, 32), (16, 64, 128, 256), (False, True)) if r * n <= 4096]
    return [measure_one(r, n, is_priced=p) for r, n, p in cases]


if __name__ == "__main__":
    run("build_tree", (__doc__ or "").splitlines()[0], measure)
