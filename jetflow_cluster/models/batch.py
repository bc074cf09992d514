"""One ragged batch as a model sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jetflow_kernels.tree_attention import TreeAttentionPlan


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
    attention: TreeAttentionPlan
