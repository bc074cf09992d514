"""A budget that prices and learns without a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jetflow_cluster.engine.budget import FixedBudget
from jetflow_cluster.engine.protocols import Allowance, DecodeLoad, Source, StepPlan
from jetflow_cluster.engine.value_model import ValueModel
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree


class LearningBudget(FixedBudget):
    """Prices and calibration as mode ``auto`` has them, without a clock: the same steps give the same decisions."""

    def __init__(self) -> None:
        super().__init__(8)
        self.value = ValueModel()
        self.num_learned = self.num_steps = 0

    @property
    def maps(self) -> np.ndarray:
        return self.value.maps

    def allow(self, load: DecodeLoad) -> list[Allowance]:
        # Every other step without the head, where those that repeat themselves guess all the same.
        self.num_steps += 1
        uses_head = self.num_steps % 2 == 0
        allowances = [replace(found, uses_head=uses_head, draft_depth=9) for found in super().allow(load)]
        return [
            replace(found, bias=40_000 * (i % 2), max_tree_nodes=16 - 9 * (i % 2)) for i, found in enumerate(allowances)
        ]

    def price_rows(self, plan: StepPlan, sources: Sequence[Source]) -> StepPlan:
        if all(source is Source.NONE for source in sources):
            return plan
        asked = sum(source is Source.HEAD for source in sources)
        return replace(plan, row_costs=1000 + 100 * asked + 30 * np.arange(plan.tree_budget + 1, dtype=np.int64))

    def price(
        self, plan: StepPlan, tables: Sequence[CandidateTable | None]
    ) -> tuple[StepPlan, Sequence[CandidateTable | None]]:
        kinds = [int(not item.request.params.is_greedy) for item in plan.items]
        sources = [
            Source.NONE if table is None else Source.HEAD if table.ids.shape[1] > 1 else Source.CHAIN
            for table in tables
        ]
        return self.price_rows(plan, sources), self.value.calibrate(tables, kinds)

    def observe(
        self, plan: StepPlan, trees: Sequence[DraftTree], paths: Sequence[AcceptedPath | None], took_s: float
    ) -> None:
        grown = [i for i, tree in enumerate(trees) if tree.num_nodes > 1 and paths[i] is not None]
        if grown:
            kinds = [int(not plan.items[i].request.params.is_greedy) for i in grown]
            nodes = [path.nodes for i in grown if (path := paths[i]) is not None]
            self.value.observe([trees[i] for i in grown], nodes, kinds)
            self.value.refresh()
            self.num_learned += 1
