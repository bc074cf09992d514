"""From candidate tables to trees: the exact set of the most probable prefixes, over all requests at once.

Best-first search: a node that is taken offers its first child and its next sibling (as in DDTree and OPT-Tree). Both
come behind it in the order, so nodes are taken in that order and the result is exact.

How many nodes are taken may be left to a price. With R trees, ``v`` the probability of a node (the tokens that it is
expected to add) and ``cost(n)`` the time of a whole step with n rows, the set of nodes is chosen that maximises

    ``(R + sum of v) / cost(R + number of nodes)``,

the tokens per second of the step. Among sets of m nodes that hold the parent of each of their nodes none has a greater
sum than the first m of the best-first order: no set of m nodes has, and the first m are such a set, since a child is
worth no more than its parent. So the best set is the best of these prefixes, whatever the shape of ``cost``; a single
token, a chain, and no speculation at all are among them. At the optimum a node is worth at least its marginal cost at
the rate of tokens per second that is reached, and what is left out is worth less (Dinkelbach's condition). Values are
integers, ratios are compared by cross multiplication, and of equal ones the smaller set is taken, so that every device
chooses alike. On a CPU with a compiler C grows them (`jetflow_kernels.cpu`), elsewhere the Python below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
import torch

from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_kernels.cpu.trees import grow_trees

#: Fixed-point units per nat.
SCORE_UNIT = 2**16
#: Worst score of one step, 256 nats: 64 steps of it stay within int32.
MIN_SCORE = -(2**24)
#: Fixed-point units per expected token.
VALUE_UNIT = 2**24
#: Units of score per entry of `VALUE_TABLE`, as a shift: 2^-8 nat.
VALUE_SHIFT = 8
#: Expected tokens of a node by its score, ``[min(-score >> VALUE_SHIFT, last)]``, over 24 nats.
VALUE_TABLE = tuple(round(VALUE_UNIT * math.exp(-i / 256)) for i in range(24 * 256))
_VALUES = torch.tensor(VALUE_TABLE, dtype=torch.int64)
#: Nodes between two looks at whether more of them could still pay.
_LOOK_EVERY = 16


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


def cut_table(table: CandidateTable, width: int) -> CandidateTable:
    """The first `width` candidates of each depth, with their scores as they are."""
    if table.ids.shape[1] <= width:
        return table
    num_parents = min(table.scores.shape[1], width)
    return CandidateTable(ids=table.ids[:, :width], scores=table.scores[:, :num_parents, :width])


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
    biases: Sequence[int] | None = None,
    row_costs: np.ndarray | None = None,
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
        biases: added to the scores of each request where requests are compared with each other and with the price,
            fixed point; the order inside a tree and its scores are the same with any. None is 0 for all.
        row_costs: int64, ``row_costs[n]`` is what the step costs with n nodes in all trees together, roots included, in
            any unit, above 0 and non-decreasing, for n up to the budget at least; None takes as many nodes as it
            allows.

    Raises:
        ValueError: when the budget does not cover the roots, or the costs do not cover the budget.
    """
    num_roots, num_left = len(tables), sum(max_nodes)
    if verify_budget is not None:
        if verify_budget < num_roots:
            raise ValueError(f"verify_budget = {verify_budget}: must cover the roots of {num_roots} trees")
        num_left = verify_budget - num_roots
    biases = [0] * num_roots if biases is None else biases
    limits = zip(tables, max_nodes, max_depths, strict=True)
    room = [0 if table is None or depth <= 0 else max(nodes - 1, 0) for table, nodes, depth in limits]
    costs = None
    if row_costs is not None:
        num_left = min(num_left, sum(room))
        if len(row_costs) <= num_roots + num_left:
            raise ValueError(f"row_costs for {len(row_costs) - 1} rows: must go up to {num_roots + num_left}")
        costs = row_costs[num_roots : num_roots + num_left + 1].astype(np.int64)
    pairs = [None if table is None else (table.ids, table.scores) for table in tables]
    grown = grow_trees(
        pairs,
        anchor_ids,
        num_left=room,
        max_depths=max_depths,
        total_left=num_left,
        biases=biases,
        costs=None if costs is None else torch.from_numpy(costs),
        values=_VALUES,
    )
    if grown is not None:
        return [DraftTree(token_ids=t, parents=p, depths=d, scores=s) for t, p, d, s in grown]
    return _grow_here(tables, anchor_ids, max_nodes, max_depths, biases, num_left, costs)


def _grow_here(
    tables: Sequence[CandidateTable | None],
    anchor_ids: Sequence[int],
    max_nodes: Sequence[int],
    max_depths: Sequence[int],
    biases: Sequence[int],
    num_left: int,
    costs: np.ndarray | None,
) -> list[DraftTree]:
    """The trees of `build_trees`, grown in Python; `costs` begins where all trees are bare roots."""
    growing = [
        _GrowingTree(anchor, table, nodes, depth, bias)
        for table, anchor, nodes, depth, bias in zip(tables, anchor_ids, max_nodes, max_depths, biases, strict=True)
    ]
    price = None if costs is None else _Price(costs, len(tables))
    _grow(growing, num_left, price)
    if price is not None:
        price.cut(growing)
    return [
        DraftTree(token_ids=tree.token_ids, parents=tree.parents, depths=tree.depths, scores=tree.scores)
        for tree in growing
    ]


#: Scores of all siblings by rank, and their ranks, best first.
_Siblings = tuple[list[int], list[int]]


class _GrowingTree:
    """Lists of one tree, and its table, of which only the rows that are asked for become Python lists."""

    __slots__ = (
        "_siblings",
        "_table",
        "bias",
        "depths",
        "ids",
        "max_depth",
        "num_left",
        "parents",
        "scores",
        "token_ids",
    )

    def __init__(self, anchor_id: int, table: CandidateTable | None, max_nodes: int, max_depth: int, bias: int):
        self.bias = bias
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


class _Price:
    """Which number of nodes, taken best first, gives the most expected tokens per cost."""

    def __init__(self, costs: np.ndarray, num_roots: int):
        self._costs: list[int] = costs.tolist()
        self._later = costs
        #: Tree of each node that was taken, in order.
        self._taken: list[int] = []
        self._value = num_roots * VALUE_UNIT
        self._best_value, self._best_cost, self._num_best = self._value, self._costs[0], 0

    def take(self, tree: int, score: int) -> bool:
        """Counts a node; False when no further one, each worth no more, could make the rate better."""
        value = VALUE_TABLE[min(-min(score, 0) >> VALUE_SHIFT, len(VALUE_TABLE) - 1)]
        self._taken.append(tree)
        self._value += value
        num = len(self._taken)
        if self._value * self._best_cost > self._best_value * self._costs[num]:
            self._best_value, self._best_cost, self._num_best = self._value, self._costs[num], num
        elif num % _LOOK_EVERY == 0 or num - self._num_best == 4:
            later = self._later[num + 1 :]
            most = self._value + np.arange(1, len(later) + 1, dtype=np.int64) * value
            return bool((most * self._best_cost > self._best_value * later).any())
        return True

    def cut(self, trees: Sequence[_GrowingTree]) -> None:
        """Takes the nodes behind the best number out again."""
        for r in reversed(self._taken[self._num_best :]):
            for nodes in (trees[r].token_ids, trees[r].parents, trees[r].depths, trees[r].scores):
                nodes.pop()


#: Negated cumulative score with the request's bias, depth, ranks from the root, request; then place among the siblings,
#: parent node, the parent's biased score, and the siblings. No two entries agree in the first four.
_Entry = tuple[int, int, tuple[int, ...], int, int, int, int, _Siblings]


def _grow(trees: Sequence[_GrowingTree], num_left: int, price: _Price | None) -> None:
    """Takes the best `num_left` nodes of all trees, or fewer where the price says that the rest cannot pay."""
    heap: list[_Entry] = []
    for r, tree in enumerate(trees):
        if tree.num_left:
            row, order = siblings = tree.siblings(1, 0)
            heap.append((-row[order[0]] - tree.bias, 1, (order[0],), r, 0, 0, tree.bias, siblings))
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
        tree.scores.append(-negated - tree.bias)
        tree.num_left -= 1
        num_left -= 1
        if price is not None and not price.take(r, -negated):
            break
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
