"""Self-attention over paged KV."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import Piece, QkvLinear, RowParallelLinear
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store
from jetflow_kernels.tree_attention import AttentionPlan, tree_attention


class PagedAttention(InferenceModule):
    """Fused QKV; norm of q and k where the model has one, rotation and store into pages; tree attention; output
    projection."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        tp: TpGroup,
        *,
        has_qk_norm: bool = True,
    ):
        super().__init__()
        self.qkv = QkvLinear(hidden_size, num_heads, num_kv_heads, head_dim, tp)
        self.o = RowParallelLinear("o_proj", num_heads * head_dim, hidden_size, tp, "num_attention_heads * head_dim")
        self.num_heads, self.num_kv_heads = self.qkv.num_local_heads, self.qkv.num_local_kv_heads
        self.head_dim, self._eps, self._scale = head_dim, eps, head_dim**-0.5
        #: Norm weight of each query head, then of each key head, so that one product serves all.
        self.qk_norm: nn.Parameter | None = None
        if has_qk_norm:
            weights = torch.empty(self.num_heads + self.num_kv_heads, head_dim)
            self.qk_norm = nn.Parameter(weights, requires_grad=False)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        plan: AttentionPlan,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
    ) -> torch.Tensor:
        """Rows ``[T, hidden_size]``; pages ``[num_pages, page_size, num_kv_heads, head_dim]`` are written to."""
        num_rows = x.shape[0]
        qkv = self.qkv(x).view(num_rows, -1, self.head_dim)
        q = qk_norm_rope_store(
            qkv, self.qk_norm, cos, sin, slot_mapping, k_pages, v_pages, num_heads=self.num_heads, eps=self._eps
        )
        out = tree_attention(plan, q, k_pages, v_pages, scale=self._scale)
        projected: torch.Tensor = self.o(out.reshape(num_rows, -1))
        return projected

    def store_context(
        self,
        kv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
    ) -> None:
        """Writes K and V, which `qkv.kv_weight` made, of rows ``[N, 2 * num_kv_heads * head_dim]``; attends to
        nothing."""
        kv = kv.unflatten(1, (-1, self.head_dim))
        k_norm = self.qk_norm[self.num_heads :] if self.qk_norm is not None else None
        qk_norm_rope_store(kv, k_norm, cos, sin, slot_mapping, k_pages, v_pages, num_heads=0, eps=self._eps)

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from self.qkv.pieces()
        yield from self.o.pieces()
        if self.qk_norm is None:
            return
        for name, part in (("q_norm", self.qk_norm[: self.num_heads]), ("k_norm", self.qk_norm[self.num_heads :])):
            yield f"{name}.weight", (self.head_dim,), (slice(None),), part
