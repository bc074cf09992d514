"""From candidate tables to trees: the exact set of the most probable prefixes, over all requests at once.

Best-first search: a node that is taken offers its first child and its next sibling (as in DDTree and OPT-Tree). Both
come behind it in the order, so nodes are taken in that order and the result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

import torch

from jetflow_cluster.tree.draft_tree import DraftTree

#: Fixed-point units per nat.
SCORE_UNIT = 2**16
#: Worst score of one step, 256 nats: 64 steps of it stay within int32.
MIN_SCORE = -(2**24)


@dataclass(frozen=True, kw_only=True)
class CandidateTable:
    """Scored candidates of one request; row d - 1 is depth d. Raises ValueError for shapes that do not fit."""

    #: Candidate tokens, int64 ``[D, W]``. Tokens may repeat.
    ids: torch.Tensor
    #: Fixed-point log-probabilities, at most 0, int32 ``[D, P, W]``: of each candidate under candidate p of the depth
    #: above. P is 1 (the same under every parent) or W; depth 1 reads p = 0.
    scores: torch.Tensor

    def __post_init__(self) -> None:
        ids, scores = tuple(self.ids.shape), tuple(self.scores.shape)
        if len(ids) != 2 or 0 in ids or scores not in ((ids[0], 1, ids[1]), (ids[0], ids[1], ids[1])):
            raise ValueError(f"ids of shape {ids} with scores of shape {scores}: must be [D, W] and [D, 1 or W, W]")


def to_fixed_point(logprobs: torch.Tensor) -> torch.Tensor:
    """int32 of the same shape: log-probabilities in units of 2^-16 nat, rounded to nearest, within [-256 nats, 0].

    What is not a number counts as impossible.
    """
    scaled = torch.nan_to_num(logprobs * SCORE_UNIT, nan=MIN_SCORE, neginf=MIN_SCORE)
    return scaled.clamp_(MIN_SCORE, 0).round_().to(torch.int32)


def build_trees(
    tables: Sequence[CandidateTable | None],
    anchor_ids: Sequence[int],
    *,
    max_nodes: Sequence[int],
    max_depths: Sequence[int],
    verify_budget: int | None = None,
) -> list[DraftTree]:
    """The most probable prefixes of all requests together, nodes of each tree best first.

    Ties go to the lower depth, then to the lower ranks (candidate indices along the path, compared from the root),
    then to the earlier request.

    Args:
        tables: candidates of each request; None gives a tree of the root only.
        anchor_ids: last committed token of each request.
        max_nodes: most nodes of each tree, the root included.
        max_depths: deepest node of each tree.
        verify_budget: most nodes of all trees together, roots included; None is no limit.

    Raises:
        ValueError: when the budget does not cover the roots.
    """
    num_left = sum(max_nodes)
    if verify_budget is not None:
        if verify_budget < len(tables):
            raise ValueError(f"verify_budget = {verify_budget}: must cover the roots of {len(tables)} trees")
        num_left = verify_budget - len(tables)
    growing = [
        _GrowingTree(anchor, table, nodes, depth)
        for table, anchor, nodes, depth in zip(tables, anchor_ids, max_nodes, max_depths, strict=True)
    ]
    _grow(growing, num_left)
    return [
        DraftTree(token_ids=tree.token_ids, parents=tree.parents, depths=tree.depths, scores=tree.scores)
        for tree in growing
    ]


#: Scores of all siblings by rank, and their ranks, best first.
_Siblings = tuple[list[int], list[int]]


class _GrowingTree:
    """Lists of one tree, and its table, of which only the rows that are asked for become Python lists."""

    __slots__ = ("_siblings", "_table", "depths", "ids", "max_depth", "num_left", "parents", "scores", "token_ids")

    def __init__(self, anchor_id: int, table: CandidateTable | None, max_nodes: int, max_depth: int):
        self.token_ids, self.parents, self.depths, self.scores = [anchor_id], [-1], [0], [0]
        self.num_left = 0
        if table is None or max_nodes <= 1 or max_depth <= 0:
            return
        self.num_left = max_nodes - 1
        self.max_depth = min(max_depth, table.ids.shape[0])
        self.ids: list[list[int]] = table.ids.tolist()
        self._table = table.scores.cpu().numpy()
        self._siblings: dict[tuple[int, int], _Siblings] = {}

    def siblings(self, depth: int, parent_rank: int) -> _Siblings:
        """The candidates of a depth under a candidate of the depth above."""
        key = (depth, parent_rank if self._table.shape[1] > 1 else 0)
        found = self._siblings.get(key)
        if found is None:
            row: list[int] = self._table[depth - 1, key[1]].tolist()
            # Reversed sorting keeps equal scores in the order of their ranks.
            found = self._siblings[key] = (row, sorted(range(len(row)), key=row.__getitem__, reverse=True))
        return found


#: Negated cumulative score, depth, ranks from the root, request; then place among the siblings, parent node, the
#: parent's score, and the siblings. No two entries agree in the first four.
_Entry = tuple[int, int, tuple[int, ...], int, int, int, int, _Siblings]


def _grow(trees: Sequence[_GrowingTree], num_left: int) -> None:
    """Takes the best `num_left` nodes of all trees."""
    heap: list[_Entry] = []
    for r, tree in enumerate(trees):
        if tree.num_left:
            row, order = siblings = tree.siblings(1, 0)
            heap.append((-row[order[0]], 1, (order[0],), r, 0, 0, 0, siblings))
    heapify(heap)
    while heap and num_left > 0:
        negated, depth, ranks, r, place, parent, parent_score, siblings = heap[0]
        tree = trees[r]
        if not tree.num_left:
            heappop(heap)
            continue
        node = len(tree.parents)
        rank = ranks[-1]
        tree.token_ids.append(tree.ids[depth - 1][rank])
        tree.parents.append(parent)
        tree.depths.append(depth)
        tree.scores.append(-negated)
        tree.num_left -= 1
        num_left -= 1
        row, order = siblings
        place += 1
        if place < len(order):
            score, path = parent_score + row[order[place]], (*ranks[:-1], order[place])
            heapreplace(heap, (-score, depth, path, r, place, parent, parent_score, siblings))
        else:
            heappop(heap)
        if depth < tree.max_depth:
            row, order = siblings = tree.siblings(depth + 1, rank)
            heappush(heap, (negated - row[order[0]], depth + 1, (*ranks, order[0]), r, 0, node, -negated, siblings))
