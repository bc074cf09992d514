"""The trees of a step: what must be grown is grown, the rest competes at the step's price."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jetflow_cluster.engine.protocols import ScheduledRequest, StepPlan
from jetflow_cluster.tree.build import CandidateTable, build_trees
from jetflow_cluster.tree.draft_tree import DraftTree


def build_planned_trees(
    plan: StepPlan,
    tables: Sequence[CandidateTable | None],
    *,
    build: Callable[..., list[DraftTree]] = build_trees,
) -> list[DraftTree]:
    """The most probable prefixes under each item's table; a prompt chunk gets a bare root.

    Requests that force speculation are outside of the price: their trees share their own budget. `build` is
    `build_trees`, or what gives the same trees elsewhere.
    """
    trees = [DraftTree.root_only(item.request.token_ids[-1]) for item in plan.items]
    if plan.row_costs is None:
        groups = [list(range(len(plan.items)))]
    else:
        decoding = [i for i, item in enumerate(plan.items) if item.num_rows == 1 and item.is_last]
        groups = [[i for i in decoding if plan.items[i].is_priced], [i for i in decoding if plan.items[i].is_forced]]
    for group in groups:
        items = [plan.items[i] for i in group]
        if not any(item.max_tree_nodes > 1 and tables[i] is not None for i, item in zip(group, items, strict=True)):
            continue
        built = build(
            [tables[i] for i in group],
            [item.request.token_ids[-1] for item in items],
            max_nodes=[item.max_tree_nodes for item in items],
            max_depths=[item.max_depth for item in items],
            verify_budget=_budget(items, plan),
            biases=[item.bias for item in items],
            row_costs=None if items[0].is_forced else plan.row_costs,
        )
        for i, tree in zip(group, built, strict=True):
            trees[i] = tree
    return trees


def _budget(items: Sequence[ScheduledRequest], plan: StepPlan) -> int:
    return plan.tree_budget if len(items) == len(plan.items) else sum(item.budget_share for item in items)
