"""Trees from the kernels, for engines whose tensors are on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from jetflow_cluster.engine.protocols import StepPlan
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_kernels.build_tree import Candidates, TreeBuffers, TreeLimits, build_tree


class DeviceTreeBuilder:
    """Builds a plan's trees with `jetflow_kernels.build_tree`; the same trees as the CPU's, bit for bit."""

    def __init__(self, device: torch.device):
        self._device = device

    def __call__(self, plan: StepPlan, tables: Sequence[CandidateTable | None]) -> list[DraftTree]:
        """The most probable prefixes under each item's table; a prompt chunk gets a bare root."""
        anchors = [item.request.token_ids[-1] for item in plan.items]
        if all(table is None for table in tables):
            return [DraftTree.root_only(anchor) for anchor in anchors]
        return build_trees_on_device(
            tables,
            anchors,
            max_nodes=[item.max_tree_nodes for item in plan.items],
            max_depths=[item.max_depth for item in plan.items],
            verify_budget=plan.tree_budget,
            device=self._device,
        )


def build_trees_on_device(
    tables: Sequence[CandidateTable | None],
    anchor_ids: Sequence[int],
    *,
    max_nodes: Sequence[int],
    max_depths: Sequence[int],
    verify_budget: int,
    device: torch.device,
) -> list[DraftTree]:
    """As `jetflow_cluster.tree.build.build_trees`, whose arguments these are.

    Raises:
        ValueError: when the budget does not cover the roots.
    """
    num_requests = len(tables)
    if verify_budget < num_requests:
        raise ValueError(f"verify_budget = {verify_budget}: must cover the roots of {num_requests} trees")
    candidates = stack_tables(tables, device)
    widths = [table.ids.shape[1] if table is not None else 0 for table in tables]
    depths = [table.ids.shape[0] if table is not None else 0 for table in tables]
    limits = [
        (max(1, nodes), max(0, min(depth, own)), width, 0)
        for nodes, depth, own, width in zip(max_nodes, max_depths, depths, widths, strict=True)
    ]
    buffers = TreeBuffers.allocate(
        num_requests=num_requests,
        num_nodes=max(nodes for nodes, *_ in limits),
        num_rows=min(verify_budget, sum(nodes for nodes, *_ in limits)),
        num_depths=candidates.ids.shape[1],
        width=candidates.ids.shape[2],
        is_conditional=candidates.scores.shape[2] > 1,
        device=device,
    )
    build_tree(
        candidates,
        TreeLimits(
            anchor_ids=torch.tensor(anchor_ids, dtype=torch.int64, device=device),
            requests=torch.tensor(limits, dtype=torch.int32, device=device),
            budget=torch.tensor([buffers.num_rows], dtype=torch.int32, device=device),
        ),
        buffers,
    )
    return trees_of(buffers)


def stack_tables(tables: Sequence[CandidateTable | None], device: torch.device) -> Candidates:
    """Tables of different depths and widths side by side; what one lacks is never read with limits of its own size."""
    own = [table for table in tables if table is not None]
    num_depths, width = (max(table.ids.shape[i] for table in own) for i in (0, 1))
    num_parents = width if any(table.scores.shape[1] > 1 for table in own) else 1
    ids = np.zeros((len(tables), num_depths, width), np.int64)
    scores = np.zeros((len(tables), num_depths, num_parents, width), np.int32)
    for r, table in enumerate(tables):
        if table is not None:
            d, w = table.ids.shape
            ids[r, :d, :w] = table.ids.numpy()
            # One row for all parents is repeated.
            scores[r, :d, :, :w] = table.scores[:, :1].numpy()
            if table.scores.shape[1] > 1:
                scores[r, :d, :w, :w] = table.scores.numpy()
    return Candidates(ids=torch.from_numpy(ids).to(device), scores=torch.from_numpy(scores).to(device))


def trees_of(buffers: TreeBuffers) -> list[DraftTree]:
    """What `build_tree` left, read to the host."""
    counts = buffers.counts.tolist()
    columns = torch.stack((buffers.token_ids, buffers.parents, buffers.depths, buffers.scores)).tolist()
    return [
        DraftTree(token_ids=tokens[:n], parents=parents[:n], depths=depths[:n], scores=scores[:n])
        for n, tokens, parents, depths, scores in zip(counts, *columns, strict=True)
    ]
