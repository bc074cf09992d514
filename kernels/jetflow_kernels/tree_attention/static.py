"""Attention over tensors of fixed sizes that a device overwrites itself, as recorded steps need it.

The host knows nothing of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from jetflow_kernels.tree_attention.metadata import CHAIN, TREE, Capacity, TreeAttentionMetadata
from jetflow_kernels.tree_attention.plan import TreeAttentionPlan
from jetflow_kernels.tree_attention.tuning import choose_splits, choose_tile


@dataclass(frozen=True, kw_only=True)
class StaticAttention:
    """Stands in a plan's place. Rows of no request attend to nothing."""

    #: Rows of q, those of no request included.
    num_rows: int
    #: KV slots per page.
    page_size: int
    metadata: TreeAttentionMetadata


@dataclass(frozen=True, kw_only=True)
class JoinedAttention:
    """Rows that the device lays out, then rows of a batch that the host knows, such as prompt chunks."""

    first: StaticAttention
    second: TreeAttentionPlan

    @property
    def num_rows(self) -> int:
        """Rows of both."""
        return self.first.num_rows + self.second.num_rows

    @property
    def page_size(self) -> int:
        """KV slots per page, of both."""
        return self.first.page_size


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """What the shape of the launches depends on."""

    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def tile_rows(self, rows_per_request: int) -> int:
        """Rows of one request in a tile."""
        group = self.num_heads // self.num_kv_heads
        return max(1, choose_tile(self.dtype, self.head_dim, rows_per_request * group).block_m // group)

    def num_splits(self, num_tiles: int, rows_per_request: int, max_context: int, device: torch.device) -> int:
        """Programs that share the keys of a tile where contexts may be so long."""
        group = self.num_heads // self.num_kv_heads
        block_n = choose_tile(self.dtype, self.head_dim, rows_per_request * group).block_n
        is_cuda = device.type == "cuda"
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1
        return choose_splits(num_tiles * self.num_kv_heads, max_context // block_n, num_sms)


def block_attention(
    heads: HeadLayout,
    *,
    num_requests: int,
    rows_per_request: int,
    page_table: torch.Tensor,
    page_size: int,
    mode: int = CHAIN,
) -> StaticAttention:
    """For as many rows of each request, whose contexts ``metadata.requests[:, 2]`` are written before each use.

    Args:
        heads: of q and the pages.
        num_requests: R.
        rows_per_request: rows of each request.
        page_table: int32 ``[R, P]``, read at each use.
        page_size: KV slots per page.
        mode: `CHAIN` or `ALL`.
    """
    device, tile_rows = page_table.device, heads.tile_rows(rows_per_request)
    firsts = range(0, rows_per_request, tile_rows)
    capacity = Capacity(
        num_tiles=num_requests * len(firsts),
        num_requests=num_requests,
        num_rows=num_requests * rows_per_request,
        num_pages=page_table.shape[1],
        num_words=1,
    )
    num_splits = heads.num_splits(capacity.num_tiles, rows_per_request, page_table.shape[1] * page_size, device)
    metadata = TreeAttentionMetadata.allocate(capacity, tile_rows=tile_rows, num_splits=num_splits, device=device)
    tiles = [(request, first) for request in range(num_requests) for first in firsts]
    requests = [(request * rows_per_request, rows_per_request, 0, mode) for request in range(num_requests)]
    metadata.tiles.copy_(torch.tensor(tiles, dtype=torch.int32))
    metadata.requests.copy_(torch.tensor(requests, dtype=torch.int32))
    return StaticAttention(
        num_rows=capacity.num_rows, page_size=page_size, metadata=replace(metadata, page_table=page_table)
    )


def tree_rows_attention(
    heads: HeadLayout,
    *,
    num_nodes: int,
    page_table: torch.Tensor,
    page_size: int,
    tiles: torch.Tensor,
    requests: torch.Tensor,
    ancestor_bits: torch.Tensor,
) -> StaticAttention:
    """Over tensors that another op writes at each use, as `jetflow_kernels.build_tree.lay_out_rows` does.

    Args:
        heads: of q and the pages.
        num_nodes: most nodes of one tree.
        page_table: int32 ``[R, P]``.
        page_size: KV slots per page.
        tiles: int32 ``[num_tiles, 2]``, of ``heads.tile_rows(num_nodes)`` rows.
        requests: int32 ``[R, 4]``.
        ancestor_bits: int32 ``[T, words]``.
    """
    device = page_table.device
    capacity = Capacity(
        num_tiles=tiles.shape[0],
        num_requests=requests.shape[0],
        num_rows=ancestor_bits.shape[0],
        num_pages=page_table.shape[1],
        num_words=ancestor_bits.shape[1],
    )
    num_splits = heads.num_splits(tiles.shape[0], num_nodes, page_table.shape[1] * page_size, device)
    empty = Capacity(num_tiles=0, num_requests=0, num_rows=0, num_pages=0, num_words=0)
    blank = TreeAttentionMetadata.allocate(
        empty, tile_rows=heads.tile_rows(num_nodes), num_splits=num_splits, device=device
    )
    return StaticAttention(
        num_rows=capacity.num_rows,
        page_size=page_size,
        metadata=replace(
            blank,
            capacity=capacity,
            page_table=page_table,
            tiles=tiles,
            requests=requests,
            ancestor_bits=ancestor_bits,
        ),
    )


def static_attention_torch(
    plan: StaticAttention, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """In plain torch, for what the kernel does not serve: fp64, and devices without Triton. Every row looks at every
    slot of its request's pages, so it is for short contexts. Arguments as `tree_attention`."""
    num_rows, head_dim = q.shape[0], q.shape[2]
    num_kv_heads = k_pages.shape[2]
    metadata = plan.metadata
    dtype = torch.promote_types(q.dtype, torch.float32)
    o_row = torch.arange(num_rows, device=q.device)
    first, count, context, mode = metadata.requests.long().unbind(1)
    # [T, R]
    is_of = (o_row[:, None] >= first) & (o_row[:, None] < first + count)
    has_request = is_of.any(1)
    request = is_of.int().argmax(1)
    o_local = o_row - first[request]
    slots = metadata.page_table.long()[:, :, None] * plan.page_size + torch.arange(plan.page_size, device=q.device)
    slots = slots.flatten(1)[request]
    # [T, L]: index of a key among the rows of its own request.
    o_own = torch.arange(slots.shape[1], device=q.device) - context[request][:, None]
    last = torch.where(mode == TREE, -1, torch.where(mode == CHAIN, 0, count))[request]
    last = torch.where((mode == CHAIN)[request], o_local, last)
    is_seen = o_own <= last[:, None]
    if metadata.ancestor_bits.shape[1]:
        word = (o_own // 32).clamp(0, metadata.ancestor_bits.shape[1] - 1)
        bits = metadata.ancestor_bits.long().gather(1, word) >> (o_own % 32)
        is_node = (o_own >= 0) & (o_own < count[request][:, None]) & (mode == TREE)[request][:, None]
        is_seen = is_seen | (is_node & ((bits & 1) != 0))
    is_seen = is_seen & (o_own < count[request][:, None]) & has_request[:, None]
    k, v = (pages.view(-1, num_kv_heads, head_dim)[slots].to(dtype) for pages in (k_pages, v_pages))
    k, v = (x.masked_fill(~is_seen[:, :, None, None], 0.0) for x in (k, v))
    grouped = q.to(dtype).view(num_rows, num_kv_heads, -1, head_dim)
    scores = torch.einsum("thgd,tlhd->thgl", grouped, k) * scale
    scores = scores.masked_fill(~is_seen[:, None, None, :], float("-inf"))
    weights = torch.where(has_request[:, None, None, None], scores, 0.0).softmax(-1)
    return torch.einsum("thgl,tlhd->thgd", weights, v).reshape(q.shape).to(q.dtype)
