"""Self-attention over paged KV."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from jetflow_cluster.layers.linear import Piece, QkvLinear, RowParallelLinear
from jetflow_cluster.layers.norm import rms_norm
from jetflow_cluster.layers.rotary import rotate
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.store_kv import store_kv
from jetflow_kernels.tree_attention import TreeAttentionPlan, tree_attention


class PagedAttention(nn.Module):
    """Fused QKV, per-head norm of q and k, rotation, store into pages, tree attention, output projection."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, tp: TpGroup):
        super().__init__()
        self.qkv = QkvLinear(hidden_size, num_heads, num_kv_heads, head_dim, tp)
        self.o = RowParallelLinear("o_proj", num_heads * head_dim, hidden_size, tp, "num_attention_heads * head_dim")
        self.num_heads, self.num_kv_heads = self.qkv.num_local_heads, self.qkv.num_local_kv_heads
        self.head_dim, self._eps = head_dim, eps
        #: Norm weight of each query head, then of each key head, so that one product serves all.
        self.qk_norm = nn.Parameter(torch.empty(self.num_heads + self.num_kv_heads, head_dim), requires_grad=False)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        plan: TreeAttentionPlan,
        kv: torch.Tensor,
    ) -> torch.Tensor:
        """Rows ``[T, hidden_size]``; `kv` ``[2, num_pages, page_size, num_kv_heads, head_dim]`` is written to."""
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], 1)
        qk = rotate(rms_norm(qk, self.qk_norm, self._eps), cos, sin)
        q, k = qk.split([self.num_heads, self.num_kv_heads], 1)
        store_kv(k, v, kv[0], kv[1], slot_mapping)
        out = tree_attention(plan, q, kv[0], kv[1], scale=self.head_dim**-0.5)
        return self.o(out.reshape(x.shape[0], -1))

    def store_context(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot_mapping: torch.Tensor, kv: torch.Tensor
    ) -> None:
        """Writes K and V of rows ``[N, hidden_size]`` and attends to nothing."""
        heads = F.linear(x, self.qkv.kv_weight).view(x.shape[0], -1, self.head_dim)
        k, v = heads.split([self.num_kv_heads, self.num_kv_heads], 1)
        k = rms_norm(k, self.qk_norm[self.num_heads :], self._eps)
        store_kv(rotate(k, cos, sin), v, kv[0], kv[1], slot_mapping)

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from self.qkv.pieces()
        yield from self.o.pieces()
        for name, part in (("q_norm", self.qk_norm[: self.num_heads]), ("k_norm", self.qk_norm[self.num_heads :])):
            yield f"{name}.weight", (self.head_dim,), (slice(None),), part
