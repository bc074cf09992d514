"""What speculation did over all steps, for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jetflow_cluster.engine.protocols import StepPlan
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import SpeculationMode


@dataclass(kw_only=True)
class StepCounters:
    """Counts since the engine began to serve."""

    #: Guessed nodes that were verified, roots not counted.
    num_verified_nodes: int = 0
    #: ``accepted_by_depth[d]``: guesses at depth d + 1 that were right.
    accepted_by_depth: list[int] = field(default_factory=list)
    #: Steps with at least one guessed node.
    num_drafted_steps: int = 0
    #: Steps in which some request might have speculated, and none did.
    num_skipped_steps: int = 0
    #: Steps in which some requests were guessed for elsewhere while others were verified.
    num_overlapped_steps: int = 0

    def as_stats(self) -> dict[str, Any]:
        """The fields of `EngineStats` of the same names."""
        return vars(self) | {"accepted_by_depth": tuple(self.accepted_by_depth)}

    def count(self, plan: StepPlan, trees: Sequence[DraftTree], paths: Sequence[AcceptedPath | None]) -> None:
        """Counts one step."""
        self.num_overlapped_steps += bool(plan.ahead)
        num_nodes = 0
        for item, tree, path in zip(plan.items, trees, paths, strict=True):
            if item.num_rows > 1 or path is None or tree.num_nodes == 1:
                continue
            num_nodes += tree.num_nodes - 1
            counts = self.accepted_by_depth
            counts += [0] * (path.num_accepted - len(counts))
            for depth in range(path.num_accepted):
                counts[depth] += 1
        self.num_verified_nodes += num_nodes
        if num_nodes:
            self.num_drafted_steps += 1
        elif any(i.num_rows == 1 and i.request.params.speculation.mode is not SpeculationMode.OFF for i in plan.items):
            self.num_skipped_steps += 1
