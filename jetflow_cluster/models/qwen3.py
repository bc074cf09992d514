"""Dense Qwen3: the target model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from jetflow_cluster.layers.attention import PagedAttention
from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import GateUpLinear, Piece, RowParallelLinear, prefixed
from jetflow_cluster.layers.norm import RmsNorm
from jetflow_cluster.layers.rotary import Rotary
from jetflow_cluster.models.batch import ForwardBatch, layer_pages
from jetflow_cluster.models.config import TargetConfig, TransformerConfig
from jetflow_cluster.models.target_ends import TargetEnds
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.pointwise import silu_mul


class Mlp(InferenceModule):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int, tp: TpGroup):
        super().__init__()
        self.gate_up = GateUpLinear(hidden_size, intermediate_size, tp)
        self.down = RowParallelLinear("down_proj", intermediate_size, hidden_size, tp, "intermediate_size")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, hidden_size]`` to the same."""
        out: torch.Tensor = self.down(silu_mul(self.gate_up(x)))
        return out

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from self.gate_up.pieces()
        yield from self.down.pieces()


class Qwen3Layer(InferenceModule):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: TransformerConfig, tp: TpGroup):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RmsNorm("input_layernorm", hidden, eps)
        self.attention = PagedAttention(hidden, config.num_heads, config.num_kv_heads, config.head_dim, eps, tp)
        self.mlp_norm = RmsNorm("post_attention_layernorm", hidden, eps)
        self.mlp = Mlp(hidden, config.intermediate_size, tp)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: ForwardBatch,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
    ) -> torch.Tensor:
        """Rows ``[T, hidden_size]``; the pages are the layer's part of the cache. `x` is left as it is."""
        h = self.input_norm(x)
        h = self.attention(h, cos, sin, batch.slot_mapping, batch.attention, k_pages, v_pages).add_(x)
        out: torch.Tensor = h.add_(self.mlp(self.mlp_norm(h)))
        return out

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from self.input_norm.pieces()
        yield from self.mlp_norm.pieces()
        yield from prefixed("self_attn", self.attention.pieces())
        yield from prefixed("mlp", self.mlp.pieces())


class Qwen3Model(TargetEnds):
    """One rank's part of a dense Qwen3 target. For inference only; parameters hold no gradients."""

    def __init__(self, config: TargetConfig, tp: TpGroup, device: torch.device):
        super().__init__(config, tp)
        self._stack = [Qwen3Layer(config, tp) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(self._stack)
        self.norm = RmsNorm("model.norm", config.hidden_size, config.rms_norm_eps)
        self._rotary = Rotary(config.rope, config.head_dim, device)

    @property
    def num_local_heads(self) -> int:
        """Query heads of this rank."""
        return self._stack[0].attention.num_heads

    @property
    def num_local_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self._stack[0].attention.num_kv_heads

    def forward(
        self, batch: ForwardBatch, kv: torch.Tensor, tap_layer_ids: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes all rows and stores their K and V.

        Args:
            batch: T rows.
            kv: ``[num_layers, 2, num_pages, page_size, num_local_kv_heads, head_dim]``.
            tap_layer_ids: layers whose output (the residual stream behind them) is wanted, in that order.

        Returns:
            hidden ``[T, hidden_size]`` behind the final norm, and taps ``[T, len(tap_layer_ids) * hidden_size]``.
        """
        x = self.embedding(batch.token_ids)
        cos, sin = self._rotary.angles(batch.positions, x.dtype, batch.max_position)
        taps = {}
        for i, (layer, (k_pages, v_pages)) in enumerate(zip(self._stack, layer_pages(kv), strict=True)):
            x = layer(x, cos, sin, batch, k_pages, v_pages)
            if i in tap_layer_ids:
                taps[i] = x
        return self.norm(x), torch.cat([taps[i] for i in tap_layer_ids], -1) if tap_layer_ids else None

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from super().pieces()
        yield from self.norm.pieces()
        for i, layer in enumerate(self._stack):
            yield from prefixed(f"model.layers.{i}", layer.pieces())
