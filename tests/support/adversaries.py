"""Sources of trees that try to make the engine choose a token that the target would not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from jetflow_cluster.engine.protocols import StepPlan
from jetflow_cluster.engine.request import Request
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree

#: The true next tokens of a request, as many as are known.
Truth = Callable[[Request], Sequence[int]]


class NoDrafter:
    """A drafter whose guesses come from the tree builder alone."""

    tap_layer_ids: tuple[int, ...] = ()
    num_scratch_rows = 0
    num_block_slots: int | None = None
    epoch = 0

    def __init__(self, max_depth: int = 12):
        self.max_depth = max_depth

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        return taps

    def absorb(self, requests: Sequence[Request]) -> None:
        del requests

    def draft(self, plan: StepPlan) -> list[CandidateTable | None]:
        return [None] * len(plan.items)


class Adversary:
    """A tree builder: ``kind`` is empty, right, wrong, random or repeated."""

    def __init__(self, kind: str, truth: Truth, vocab_size: int, seed: int = 0):
        self._kind, self._truth, self._vocab_size = kind, truth, vocab_size
        self._rng = random.Random(seed)

    def __call__(self, plan: StepPlan, tables: Sequence[CandidateTable | None]) -> list[DraftTree]:
        del tables
        trees = []
        budget = plan.tree_budget
        for item in plan.items:
            nodes = item.max_tree_nodes if item.is_last and item.num_rows == 1 else 1
            nodes = min(nodes, item.budget_share)
            budget -= nodes
            trees.append(self._tree(item.request, nodes, item.max_depth))
        assert budget >= 0
        return trees

    def _tree(self, request: Request, num_nodes: int, max_depth: int) -> DraftTree:
        tokens, parents, depths = [request.token_ids[-1]], [-1], [0]
        truth = list(self._truth(request))
        # Nodes whose whole path is what the target says.
        true_nodes = {0}
        while len(tokens) < num_nodes and self._kind != "empty":
            parent = self._parent(depths, max_depth)
            if parent is None:
                break
            right = truth[depths[parent]] if parent in true_nodes and depths[parent] < len(truth) else None
            token = self._token(right)
            if right is not None and token == right:
                true_nodes.add(len(tokens))
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        scores = [-i for i in range(len(tokens))]
        return DraftTree(token_ids=tokens, parents=parents, depths=depths, scores=scores)

    def _parent(self, depths: list[int], max_depth: int) -> int | None:
        if self._kind == "right" and depths[-1] < max_depth:
            return len(depths) - 1
        candidates = [i for i, depth in enumerate(depths) if depth < max_depth]
        return self._rng.choice(candidates) if candidates else None

    def _token(self, right: int | None) -> int:
        other = self._rng.randrange(self._vocab_size)
        if self._kind == "right" and right is not None:
            return right
        if self._kind == "wrong":
            return (right + 1 + other % (self._vocab_size - 1)) % self._vocab_size if right is not None else other
        if self._kind == "random" and right is not None and self._rng.random() < 0.4:
            return right
        if self._kind == "repeated":
            # Siblings carry the right token several times over, each with a subtree of its own.
            return right if right is not None and self._rng.random() < 0.8 else 7
        return other
