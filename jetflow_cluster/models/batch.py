"""One ragged batch as a model sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jetflow_kernels.tree_attention import AttentionPlan


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Rows of all requests, one behind the other."""

    #: int64 ``[T]``.
    token_ids: torch.Tensor
    #: int64 ``[T]``: positions for RoPE; a tree node's is its context's length plus its depth.
    positions: torch.Tensor
    #: int64 ``[T]``: ``page * page_size + offset`` where a row's K and V go.
    slot_mapping: torch.Tensor
    #: Who sees whom.
    attention: AttentionPlan
    #: The highest position, where the host knows it.
    max_position: int | None = None


def layer_pages(kv: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V pages of each layer: views of ``[num_layers, 2, num_pages, page_size, num_kv_heads, head_dim]``."""
    views = kv.view(-1, *kv.shape[2:]).unbind(0)
    return list(zip(views[::2], views[1::2], strict=True))
