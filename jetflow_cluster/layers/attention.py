"""Self-attention over paged KV."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import Piece, QkvLinear, RowParallelLinear
from jetflow_cluster.layers.norm import rms_norm
from jetflow_cluster.layers.rotary import rotate
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.store_kv import store_kv
from jetflow_kernels.tree_attention import TreeAttentionPlan, tree_attention


class PagedAttention(InferenceModule):
    """Fused QKV, per-head norm of q and k, rotation, store into pages, tree attention, output projection."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, tp: TpGroup):
        super().__init__()
        self.qkv = QkvLinear(hidden_size, num_heads, num_kv_heads, head_dim, tp)
        self.o = RowParallelLinear("o_proj", num_heads * head_dim, hidden_size, tp, "num_attention_heads * head_dim")
        self.num_heads, self.num_kv_heads = self.qkv.num_local_heads, self.qkv.num_local_kv_heads
        self.head_dim, self._eps, self._scale = head_dim, eps, head_dim**-0.5
        self._q_and_k = [self.num_heads, self.num_kv_heads]
        self._rotated_and_not = [self.num_heads + self.num_kv_heads, self.num_kv_heads]
        #: Norm weight of each query head, then of each key head, so that one product serves all.
        self.qk_norm = nn.Parameter(torch.empty(self._rotated_and_not[0], head_dim), requires_grad=False)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        plan: TreeAttentionPlan,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
    ) -> torch.Tensor:
        """Rows ``[T, hidden_size]``; pages ``[num_pages, page_size, num_kv_heads, head_dim]`` are written to."""
        num_rows = x.shape[0]
        qk, v = self.qkv(x).view(num_rows, -1, self.head_dim).split_with_sizes(self._rotated_and_not, 1)
        q, k = rotate(rms_norm(qk, self.qk_norm, self._eps), cos, sin).split_with_sizes(self._q_and_k, 1)
        store_kv(k, v, k_pages, v_pages, slot_mapping)
        out = tree_attention(plan, q, k_pages, v_pages, scale=self._scale)
        projected: torch.Tensor = self.o(out.reshape(num_rows, -1))
        return projected

    def store_context(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
    ) -> None:
        """Writes K and V of rows ``[N, hidden_size]`` and attends to nothing."""
        heads = self.qkv.key_values(x).view(x.shape[0], -1, self.head_dim)
        k = rms_norm(heads[:, : self.num_kv_heads], self.qk_norm[self.num_heads :], self._eps)
        store_kv(rotate(k, cos, sin), heads[:, self.num_kv_heads :], k_pages, v_pages, slot_mapping)

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from self.qkv.pieces()
        yield from self.o.pieces()
        for name, part in (("q_norm", self.qk_norm[: self.num_heads]), ("k_norm", self.qk_norm[self.num_heads :])):
            yield f"{name}.weight", (self.head_dim,), (slice(None),), part
