"""A batch as the Triton kernel reads it: small int32 tensors, overwritten in place for the next batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jetflow_kernels.tree_attention.plan import TreeAttentionPlan
from jetflow_kernels.upload import upload

#: How rows see the rows of their own request.
TREE, CHAIN, ALL = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Sizes of the tensors; a batch that fits them can take another one's place, as a CUDA graph's replay needs."""

    #: Tiles of query rows.
    num_tiles: int
    num_requests: int
    num_rows: int
    #: Pages of one request.
    num_pages: int
    #: Words of 32 ancestors.
    num_words: int

    @classmethod
    def of(cls, plan: TreeAttentionPlan, tile_rows: int) -> Capacity:
        """What one batch takes, with tiles of so many rows of one request."""
        largest_tree = max((n for n, chain in zip(plan.query_lens, plan.is_chain, strict=True) if not chain), default=1)
        return cls(
            num_tiles=sum(-(-n // tile_rows) for n in plan.query_lens),
            num_requests=plan.num_requests,
            num_rows=plan.num_rows,
            num_pages=plan.page_table.shape[1],
            num_words=-(-largest_tree // 32),
        )

    def holds(self, other: Capacity) -> bool:
        """True when another batch's tensors fit."""
        return all(getattr(self, name) >= getattr(other, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class TreeAttentionMetadata:
    """Tensors on the device, int32 where not said. Tiles behind the last one have request -1 and are skipped."""

    #: Rows of one request that a tile holds.
    tile_rows: int
    #: Programs that share the keys of one tile.
    num_splits: int
    capacity: Capacity
    #: ``[num_tiles, 2]``: request, and its first row in the tile.
    tiles: torch.Tensor
    #: ``[num_requests, 4]``: first row in the batch, rows, context length, and `TREE`, `CHAIN` or `ALL`.
    requests: torch.Tensor
    #: ``[num_requests, num_pages]``.
    page_table: torch.Tensor
    #: ``[num_rows, num_words]``; see `TreeAttentionPlan.ancestor_bits`.
    ancestor_bits: torch.Tensor
    #: fp32, stands for the splits' results where there are no splits.
    no_splits: torch.Tensor

    @classmethod
    def allocate(
        cls, capacity: Capacity, *, tile_rows: int, num_splits: int, device: torch.device
    ) -> TreeAttentionMetadata:
        """Room for batches up to a capacity, without any tile yet."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            tile_rows=tile_rows,
            num_splits=num_splits,
            capacity=capacity,
            tiles=zeros(capacity.num_tiles, 2).fill_(-1),
            requests=zeros(capacity.num_requests, 4),
            page_table=zeros(capacity.num_requests, capacity.num_pages),
            ancestor_bits=zeros(capacity.num_rows, capacity.num_words),
            no_splits=torch.zeros(1, dtype=torch.float32, device=device),
        )

    def fill(self, plan: TreeAttentionPlan) -> None:
        """Overwrites everything with another batch. Raises ValueError when it does not fit."""
        needed = Capacity.of(plan, self.tile_rows)
        if not self.capacity.holds(needed):
            raise ValueError(f"a batch of {needed} does not fit {self.capacity}")
        tiles = [
            (request, first)
            for request, num_rows in enumerate(plan.query_lens)
            for first in range(0, num_rows, self.tile_rows)
        ]
        tiles += [(-1, 0)] * (self.capacity.num_tiles - len(tiles))
        modes = [ALL if plan.bidirectional else CHAIN if chain else TREE for chain in plan.is_chain]
        requests = list(zip(plan.query_start[:-1], plan.query_lens, plan.context_lens, modes, strict=True))
        device = self.tiles.device
        self.tiles.copy_(upload(torch.tensor(tiles, dtype=torch.int32), device))
        self.requests[: len(requests)].copy_(upload(torch.tensor(requests, dtype=torch.int32), device))
        pages = plan.page_table
        self.page_table[: pages.shape[0], : pages.shape[1]].copy_(pages)
        if TREE in modes:
            bits = plan.ancestor_bits
            self.ancestor_bits[: bits.shape[0], : bits.shape[1]].copy_(upload(bits, device))
