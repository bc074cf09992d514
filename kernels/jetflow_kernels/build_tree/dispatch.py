"""Which implementation serves a device."""

from __future__ import annotations

import torch

from jetflow_kernels.build_tree.buffers import Candidates, RowLayout, TreeBuffers, TreeLimits
from jetflow_kernels.build_tree.reference import build_tree_reference, lay_out_rows_reference
from jetflow_kernels.shipped import runs_triton


def build_tree(candidates: Candidates, limits: TreeLimits, out: TreeBuffers) -> None:
    """The most probable prefixes of all requests together, written into `out`, nodes of each tree best first.

    Best is the higher score; then the lower depth, then the lower ranks (candidate indices along the path, compared
    from the root). Across requests the bias of each is added to its scores, the last tie goes to the earlier request.
    With a cost, only as many nodes are kept as give the most expected tokens per price of the step; the fewest of
    equals. Nothing is read back to the host, and every launch has the same grid for the same buffers.

    Args:
        candidates: of each request.
        limits: of each request and of all together. A budget below the number of roots gives the roots alone.
        out: all on one device with the arguments.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    num_requests, num_depths, width = candidates.ids.shape
    num_parents = candidates.scores.shape[2]
    if out.siblings.shape[:3] != (num_requests, num_depths, num_parents) or limits.requests.shape != (num_requests, 4):
        raise ValueError(
            f"candidates {(num_requests, num_depths, num_parents, width)} and limits {tuple(limits.requests.shape)} "
            f"do not fit buffers made for {tuple(out.siblings.shape[:3])}"
        )
    if limits.cost is not None and limits.cost.shape[0] <= out.num_rows:
        raise ValueError(f"cost has {limits.cost.shape[0]} entries: must have one for 0 to {out.num_rows} rows")
    if not runs_triton(candidates.ids.device):
        build_tree_reference(candidates, limits, out)
        return
    from jetflow_kernels.build_tree.kernel import build_tree_triton

    build_tree_triton(candidates, limits, out)


def lay_out_rows(
    trees: TreeBuffers,
    out: RowLayout,
    *,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    pad_slot: int,
    tile_rows: int,
) -> None:
    """Rows, positions, slots and ancestors of the trees, and the tiles of `tree_attention`, in one launch.

    Node i of a request is stored at index ``context + i`` of its pages, whatever its depth.

    Args:
        trees: as `build_tree` left them.
        out: overwritten.
        context_lens: tokens of each request in the cache, int32 ``[R]``.
        page_table: int32 ``[R, P]``.
        page_size: slots per page.
        pad_slot: slot of rows behind the last one.
        tile_rows: rows of one tree in a tile.
    """
    if runs_triton(trees.token_ids.device):
        from jetflow_kernels.build_tree.kernel import lay_out_rows_triton as implementation
    else:
        implementation = lay_out_rows_reference
    implementation(
        trees,
        out,
        context_lens=context_lens,
        page_table=page_table,
        page_size=page_size,
        pad_slot=pad_slot,
        tile_rows=tile_rows,
    )
