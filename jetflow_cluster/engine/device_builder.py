"""Trees from the kernels, for engines whose tensors are on a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from jetflow_cluster.tree.build import VALUE_TABLE, CandidateTable, build_trees
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_kernels.build_tree import MAX_ROWS, Candidates, TreeBuffers, TreeLimits, build_tree


def build_trees_on_device(
    tables: Sequence[CandidateTable | None],
    anchor_ids: Sequence[int],
    *,
    max_nodes: Sequence[int],
    max_depths: Sequence[int],
    verify_budget: int | None = None,
    biases: Sequence[int] | None = None,
    row_costs: np.ndarray | None = None,
    device: torch.device,
) -> list[DraftTree]:
    """As `jetflow_cluster.tree.build.build_trees`, by `jetflow_kernels.build_tree`: the same trees, bit for bit. What
    the kernels have no room for is built on the host.

    Raises:
        ValueError: when the budget does not cover the roots, or the costs do not cover the budget.
    """
    num_requests = len(tables)
    biases = [0] * num_requests if biases is None else biases
    limits = [
        _limits(table, nodes, depth, bias)
        for table, nodes, depth, bias in zip(tables, max_nodes, max_depths, biases, strict=True)
    ]
    num_rows = sum(nodes for nodes, *_ in limits)
    num_rows = num_rows if verify_budget is None else min(num_rows, verify_budget)
    if num_rows > MAX_ROWS or num_rows <= num_requests:
        return build_trees(
            tables,
            anchor_ids,
            max_nodes=max_nodes,
            max_depths=max_depths,
            verify_budget=verify_budget,
            biases=biases,
            row_costs=row_costs,
        )
    candidates = stack_tables(tables, device)
    buffers = TreeBuffers.allocate(
        num_requests=num_requests,
        num_nodes=max(nodes for nodes, *_ in limits),
        num_rows=num_rows,
        num_depths=candidates.ids.shape[1],
        width=candidates.ids.shape[2],
        is_conditional=candidates.scores.shape[2] > 1,
        device=device,
    )
    costs = None if row_costs is None else torch.from_numpy(row_costs.astype(np.int64)).to(device)
    build_tree(
        candidates,
        TreeLimits(
            anchor_ids=torch.tensor(anchor_ids, dtype=torch.int64, device=device),
            requests=torch.tensor(limits, dtype=torch.int32, device=device),
            budget=torch.tensor([num_rows], dtype=torch.int32, device=device),
            cost=costs,
            value_table=None if costs is None else value_table(device),
        ),
        buffers,
    )
    return trees_of(buffers)


@lru_cache
def value_table(device: torch.device) -> torch.Tensor:
    """`VALUE_TABLE` as the kernels read it."""
    return torch.tensor(VALUE_TABLE, dtype=torch.int64, device=device)


def _limits(table: CandidateTable | None, nodes: int, depth: int, bias: int) -> tuple[int, int, int, int]:
    if table is None or nodes <= 1 or depth <= 0:
        return 1, 0, 0, bias
    num_depths, width = table.ids.shape
    return nodes, min(depth, num_depths), width, bias


def stack_tables(tables: Sequence[CandidateTable | None], device: torch.device) -> Candidates:
    """Tables of different depths and widths side by side; what one lacks is not read with limits of its own size."""
    own = [table for table in tables if table is not None]
    num_depths, width = (max(table.ids.shape[i] for table in own) for i in (0, 1))
    num_parents = width if any(table.scores.shape[1] > 1 for table in own) else 1
    ids = np.zeros((len(tables), num_depths, width), np.int64)
    scores = np.zeros((len(tables), num_depths, num_parents, width), np.int32)
    for r, table in enumerate(tables):
        if table is not None:
            d, w = table.ids.shape
            ids[r, :d, :w] = table.ids.cpu().numpy()
            table_scores = table.scores.cpu().numpy()
            if table_scores.shape[1] > 1:
                scores[r, :d, :w, :w] = table_scores
            else:
                # One row for all parents is repeated.
                scores[r, :d, :, :w] = table_scores
    return Candidates(ids=torch.from_numpy(ids).to(device), scores=torch.from_numpy(scores).to(device))


def trees_of(buffers: TreeBuffers) -> list[DraftTree]:
    """What `build_tree` left, read to the host."""
    counts = buffers.counts.tolist()
    columns = torch.stack((buffers.token_ids, buffers.parents, buffers.depths, buffers.scores)).tolist()
    return [
        DraftTree(token_ids=tokens[:n], parents=parents[:n], depths=depths[:n], scores=scores[:n])
        for n, tokens, parents, depths, scores in zip(counts, *columns, strict=True)
    ]
