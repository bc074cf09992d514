"""Which implementation serves a device."""

from __future__ import annotations

import torch

from jetflow_kernels.accept_tree.buffers import SamplingTable, VerifiedTrees, WalkBuffers
from jetflow_kernels.accept_tree.reference import accept_tree_reference, commit_slots_reference
from jetflow_kernels.shipped import runs_triton


def accept_tree(trees: VerifiedTrees, table: SamplingTable | None, out: WalkBuffers) -> None:
    """Walks all trees: at each accepted node the target's own token, and the first child that carries it, if any, is
    next. Nothing is read back to the host, and every launch has the same grid for the same buffers.

    The token is the argmax of the scores, the lowest id of equals; scores are the logits in fp64 behind penalties,
    bias, barred tokens, temperature, top-k, top-p and min-p, in this order, plus Gumbel noise keyed by seed, position
    and token (`jetflow_kernels.philox_gumbel`). Greedy requests have neither temperature nor filters nor noise.

    Args:
        trees: with the logits of their rows.
        table: what the requests ask for; None where all are greedy and take the logits as they are.
        out: overwritten; no tree is deeper than its levels.

    Raises:
        ValueError: buffers that do not hold the walk.
    """
    num_requests, vocab_size = trees.token_ids.shape[0], trees.logits.shape[1]
    is_processed = table is not None and table.is_processed
    if out.nodes.shape[0] != num_requests or (is_processed and out.scores.shape != (num_requests, vocab_size)):
        raise ValueError(
            f"{num_requests} trees over {vocab_size} tokens do not fit paths {tuple(out.nodes.shape)} and scores "
            f"{tuple(out.scores.shape)}"
        )
    if table is None and out.best_scores.shape[0] < trees.logits.shape[0]:
        raise ValueError(f"logits of {trees.logits.shape[0]} rows: the buffers hold {out.best_scores.shape[0]}")
    if not runs_triton(trees.logits.device):
        accept_tree_reference(trees, table, out)
        return
    from jetflow_kernels.accept_tree.kernel import accept_tree_triton

    accept_tree_triton(trees, table, out)


def commit_slots(
    out: WalkBuffers,
    source_slots: torch.Tensor,
    target_slots: torch.Tensor,
    *,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
) -> None:
    """Where the K and V of accepted nodes are, and where they go: behind the context, in the order of the path.

    Args:
        out: as `accept_tree` left it.
        source_slots: int64 ``[R, L]``, overwritten; -1 where nothing is to be moved.
        target_slots: as `source_slots`.
        context_lens: tokens of each request in the cache, int32 ``[R]``.
        page_table: int32 ``[R, P]``.
        page_size: slots per page.
    """
    if runs_triton(out.nodes.device):
        from jetflow_kernels.accept_tree.kernel import commit_slots_triton as implementation
    else:
        implementation = commit_slots_reference
    implementation(
        out, source_slots, target_slots, context_lens=context_lens, page_table=page_table, page_size=page_size
    )
