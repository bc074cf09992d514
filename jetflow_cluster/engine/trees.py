"""The trees of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jetflow_cluster.engine.protocols import StepPlan
from jetflow_cluster.tree.build import CandidateTable, build_trees
from jetflow_cluster.tree.draft_tree import DraftTree


def build_planned_trees(
    plan: StepPlan,
    tables: Sequence[CandidateTable | None],
    *,
    build: Callable[..., list[DraftTree]] = build_trees,
) -> list[DraftTree]:
    """The most probable prefixes under each item's table; a prompt chunk gets a bare root. `build` is `build_trees`, or
    what gives the same trees elsewhere."""
    return build(
        tables,
        [item.request.token_ids[-1] for item in plan.items],
        max_nodes=[item.max_tree_nodes for item in plan.items],
        max_depths=[item.max_depth for item in plan.items],
        verify_budget=plan.tree_budget,
    )
