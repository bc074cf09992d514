"""Policies with tree sizes that are given: by the number of running requests, or one for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from jetflow_cluster.engine.protocols import Allowance, DecodeLoad, Source, StepPlan
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree


class GivenBudget(ABC):
    """The same tree size for every request of a step, at no price."""

    keeps_context = True
    reason = "given"
    price_per_s = 0.0
    has_cohorts = False
    maps: np.ndarray | None = None

    @abstractmethod
    def nodes_per_tree(self, num_decoding: int) -> int:
        """Tree nodes, root included, that one of `num_decoding` requests gets; 1 is no speculation."""

    def allow(self, load: DecodeLoad) -> list[Allowance]:
        """See `BudgetPolicy`. The trees of a step compete for the sum of their shares, so one may outgrow its own, up
        to twice."""
        share = min(self.nodes_per_tree(load.num_decoding), load.fair_nodes)
        most = 2 * share if share > 1 and load.num_decoding > 1 else share
        return [Allowance(max_tree_nodes=most, budget_share=share)] * len(load.requests)

    def price(
        self, plan: StepPlan, tables: Sequence[CandidateTable | None]
    ) -> tuple[StepPlan, Sequence[CandidateTable | None]]:
        """See `BudgetPolicy`: as they are."""
        return plan, tables

    def price_rows(self, plan: StepPlan, sources: Sequence[Source]) -> StepPlan:
        """See `BudgetPolicy`: as it is."""
        del sources
        return plan

    def observe(
        self, plan: StepPlan, trees: Sequence[DraftTree], paths: Sequence[AcceptedPath | None], took_s: float
    ) -> None:
        """See `BudgetPolicy`: nothing is learned."""
        del plan, trees, paths, took_s


class FixedBudget(GivenBudget):
    """The same tree size at every load."""

    def __init__(self, num_nodes: int):
        self._num_nodes = num_nodes

    def nodes_per_tree(self, num_decoding: int) -> int:
        """The fixed number."""
        return self._num_nodes


class BudgetTable(GivenBudget):
    """Nodes per tree by the number of decoding requests."""

    def __init__(self, nodes_by_running: Mapping[int, int]):
        if not nodes_by_running:
            raise ValueError("nodes_by_running = {}: needs at least one row")
        self.nodes_by_running = dict(sorted(nodes_by_running.items()))
        self._keys = list(self.nodes_by_running)

    def nodes_per_tree(self, num_decoding: int) -> int:
        """The row of the next larger measured load; behind the last one, the last one's rows shared out."""
        index = bisect_left(self._keys, num_decoding)
        if index < len(self._keys):
            return self.nodes_by_running[self._keys[index]]
        last = self._keys[-1]
        return max(1, self.nodes_by_running[last] * last // num_decoding)
