"""The accepting walk by the kernels, for engines whose logits are on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jetflow_cluster.engine.protocols import ScheduledRequest
from jetflow_cluster.engine.request import Request
from jetflow_cluster.layers.walk_table import WalkSampling, sampling_table
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_kernels.accept_tree import VerifiedTrees, WalkBuffers, accept_tree


def accept_on_device(
    items: Sequence[ScheduledRequest], first_rows: Sequence[int], trees: Sequence[DraftTree], logits: torch.Tensor
) -> list[AcceptedPath]:
    """Walks with `jetflow_kernels.accept_tree`, and reads the paths to the host; see `accept_on_host`."""
    device = logits.device
    samplings = [walk_sampling(item.request) for item in items]
    table = sampling_table(samplings, vocab_size=logits.shape[1], device=device)
    width = max(tree.num_nodes for tree in trees)
    nodes = torch.zeros(2, len(trees), width, dtype=torch.int32)
    for r, tree in enumerate(trees):
        nodes[:, r, : tree.num_nodes] = torch.tensor((tree.token_ids, tree.parents), dtype=torch.int32)
    sizes = torch.tensor([[tree.num_nodes for tree in trees], first_rows], dtype=torch.int32).to(device)
    # Rows of their own, aligned as all tensors are.
    token_ids, parents = (x.clone() for x in nodes.to(device))
    counts, roots = (x.clone() for x in sizes)
    out = WalkBuffers.allocate(
        num_requests=len(trees),
        num_levels=1 + max(max(tree.depths) for tree in trees),
        num_rows=logits.shape[0],
        vocab_size=logits.shape[1],
        is_processed=table is not None and table.is_processed,
        device=device,
    )
    verified = VerifiedTrees(token_ids=token_ids, parents=parents, counts=counts, first_rows=roots, logits=logits)
    accept_tree(verified, table, out)
    return paths_of(out)


def walk_sampling(request: Request) -> WalkSampling:
    """What a walk must know of a request whose anchor is the root."""
    num_barred = max(0, request.params.min_tokens - request.num_output)
    return WalkSampling(
        params=request.params,
        seed=request.seed,
        position=len(request.token_ids),
        counts=request.counted_tokens(),
        num_barred=num_barred,
        barred_ids=request.suppressed_ids if num_barred else (),
    )


def paths_of(out: WalkBuffers) -> list[AcceptedPath]:
    """What `accept_tree` left, read to the host."""
    nodes, tokens = torch.stack((out.nodes, out.token_ids)).tolist()
    return [
        AcceptedPath(nodes=n[:length], token_ids=t[:length])
        for n, t, length in zip(nodes, tokens, out.lengths.tolist(), strict=True)
    ]
