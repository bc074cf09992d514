"""What goes in and out of `build_tree`: tensors of fixed sizes, overwritten in place by each call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jetflow_kernels.shipped import size_class

#: Most candidates of one depth.
MAX_WIDTH = 16
#: Deepest node, and most nodes of one tree, roots included.
MAX_DEPTH, MAX_NODES = 64, 512
#: Most rows of all trees together, roots included.
MAX_ROWS = 4096
#: Worst score of one candidate.
MIN_SCORE = -(2**24)
#: Expected tokens are counted in units of 2^-24.
VALUE_UNIT = 2**24
#: Words of a path, each for 15 depths of 4 bits: of trees down to depth 30, and of deeper ones.
WORDS_OF_PATHS = (2, 5)
#: Columns of `TreeLimits.requests`.
LIMIT_COLUMNS = ("max_nodes", "max_depth", "width", "bias")


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Scored candidates of R requests; row d - 1 is depth d. Raises ValueError for shapes that do not fit."""

    #: Tokens, int32 or int64 ``[R, D, W]``, contiguous.
    ids: torch.Tensor
    #: Log-probabilities in units of 2^-16 nat, within [`MIN_SCORE`, 0], int32 ``[R, D, P, W]``, contiguous: of each
    #: candidate under candidate p of the depth above. P is 1 (the same under every parent) or W; depth 1 reads p = 0.
    scores: torch.Tensor

    def __post_init__(self) -> None:
        ids, scores = tuple(self.ids.shape), tuple(self.scores.shape)
        if len(ids) != 3 or 0 in ids[1:] or scores not in ((*ids[:2], 1, ids[2]), (*ids[:2], ids[2], ids[2])):
            raise ValueError(f"ids of shape {ids}, scores of shape {scores}: must be [R, D, W] and [R, D, 1 or W, W]")
        if ids[1] > MAX_DEPTH or ids[2] > MAX_WIDTH:
            raise ValueError(f"{ids[1]} depths of {ids[2]} candidates: at most {MAX_DEPTH} of {MAX_WIDTH}")


@dataclass(frozen=True, kw_only=True)
class TreeLimits:
    """How far the trees may grow."""

    #: Last committed token of each request, int32 or int64 ``[R]``.
    anchor_ids: torch.Tensor
    #: int32 ``[R, 4]``, in the order of `LIMIT_COLUMNS`: most nodes, the root included (0: there is no such request,
    #: and it gets no row); deepest node; candidates of each depth that count; what is added to a request's scores where
    #: they are compared with those of others.
    requests: torch.Tensor
    #: Most rows of all trees together, roots included, int32 ``[1]``; at least the number of roots.
    budget: torch.Tensor
    #: Price of a step of n rows, int64, above 0 and not decreasing, ``cost[n]`` for n up to `TreeBuffers.num_rows`;
    #: None grows to the budget.
    cost: torch.Tensor | None = None
    #: Expected tokens by score, int64: ``value_table[min(-s >> 8, len - 1)]`` in units of 2^-24; needed with a cost.
    value_table: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.cost is None) != (self.value_table is None):
            raise ValueError("cost and value_table: both or neither")


@dataclass(frozen=True, kw_only=True)
class TreeBuffers:
    """Trees of R requests, each in the first ``counts[r]`` places of its row, best node first; what lies behind them
    is undefined. Then what building needs in between."""

    #: Most rows of all trees together.
    num_rows: int
    #: int32 ``[R, N]``.
    token_ids: torch.Tensor
    #: int32 ``[R, N]``, smaller than the node; -1 for roots.
    parents: torch.Tensor
    #: int32 ``[R, N]``.
    depths: torch.Tensor
    #: Cumulative, int32 ``[R, N]``.
    scores: torch.Tensor
    #: Nodes of each tree, int32 ``[R]``.
    counts: torch.Tensor
    #: First row of each tree, and behind the last one the number of all rows, int32 ``[R + 1]``.
    row_start: torch.Tensor
    #: Candidates of each row of scores, best first, as score * 16 + 15 - rank; int32 ``[R, D, P, 16]``.
    siblings: torch.Tensor
    #: Nodes that each tree could have; int32 ``[R]``.
    grown: torch.Tensor
    #: Rank of each node among its siblings; int32 ``[R, N]``.
    ranks: torch.Tensor
    #: Ranks from the root, 15 depths of 4 bits per word; int64 ``[words, R, N]``.
    paths: torch.Tensor
    #: Place of each node in the order over all requests, roots not counted; int32 ``[R, N]``.
    order: torch.Tensor
    #: Value of each place of that order; int64 ``[num_rows]``.
    values: torch.Tensor

    @classmethod
    def allocate(
        cls,
        *,
        num_requests: int,
        num_nodes: int,
        num_rows: int,
        num_depths: int,
        width: int,
        is_conditional: bool,
        device: torch.device,
    ) -> TreeBuffers:
        """Room for trees of `num_nodes` nodes, `num_rows` together, from tables of `num_depths` depths and `width`
        candidates, `is_conditional` where P is the width. Raises ValueError above the limits of this module."""
        if not 1 <= num_nodes <= MAX_NODES or not 0 <= num_rows <= MAX_ROWS:
            raise ValueError(f"num_nodes = {num_nodes}, num_rows = {num_rows}: at most {MAX_NODES} and {MAX_ROWS}")

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        trees = (num_requests, num_nodes)
        return cls(
            num_rows=num_rows,
            token_ids=zeros(*trees),
            parents=zeros(*trees),
            depths=zeros(*trees),
            scores=zeros(*trees),
            counts=zeros(num_requests),
            row_start=zeros(num_requests + 1),
            siblings=zeros(num_requests, num_depths, width if is_conditional else 1, MAX_WIDTH),
            grown=zeros(num_requests),
            ranks=zeros(*trees),
            paths=zeros(size_class(-(-num_depths // 15), WORDS_OF_PATHS), *trees, dtype=torch.int64),
            order=zeros(*trees),
            values=zeros(num_rows, dtype=torch.int64),
        )

    @property
    def num_requests(self) -> int:
        """R."""
        return self.token_ids.shape[0]

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.token_ids.shape[1]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """The trees' rows one behind the other, as the target's forward pass reads them; rows behind the last one have
    token 0, position 0, no ancestors, and the slot that is for nobody."""

    #: int64 ``[num_rows]``.
    token_ids: torch.Tensor
    #: Length of the context plus the depth, int64 ``[num_rows]``.
    positions: torch.Tensor
    #: Where a row's K and V go, int64 ``[num_rows]``.
    slot_mapping: torch.Tensor
    #: int32 ``[num_rows, words]``: node j is bit ``j % 32`` of word ``j // 32`` of its descendants' and its own row.
    ancestor_bits: torch.Tensor
    #: int32 ``[R, 4]``, as `TreeAttentionMetadata.requests`: first row, rows, length of the context, 0.
    requests: torch.Tensor
    #: int32 ``[num_tiles, 2]``, as `TreeAttentionMetadata.tiles`: request and its first row; -1 behind the last.
    tiles: torch.Tensor

    @classmethod
    def allocate(
        cls, *, num_requests: int, num_nodes: int, num_rows: int, tile_rows: int, device: torch.device
    ) -> RowLayout:
        """Room for `num_rows` rows of trees of at most `num_nodes`, in tiles of `tile_rows` rows of one tree."""
        num_tiles = min(num_rows, num_rows // tile_rows + num_requests)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            token_ids=zeros(num_rows),
            positions=zeros(num_rows),
            slot_mapping=zeros(num_rows),
            ancestor_bits=zeros(num_rows, -(-num_nodes // 32), dtype=torch.int32),
            requests=zeros(num_requests, 4, dtype=torch.int32),
            tiles=zeros(num_tiles, 2, dtype=torch.int32),
        )
