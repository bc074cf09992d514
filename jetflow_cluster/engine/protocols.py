"""What the engine asks of its parts, where more than one implementation exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from jetflow_cluster.engine.request import Request
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree


@dataclass(frozen=True, kw_only=True)
class ScheduledRequest:
    """One request's part of a step."""

    request: Request
    #: Committed tokens to compute: a prompt chunk, or 1 while decoding.
    num_rows: int
    #: True when the last of these rows is the last committed token, so a token is chosen.
    is_last: bool
    #: Most nodes of the tree, root included; 1 is no speculation.
    max_tree_nodes: int = 1
    #: What this request adds to the rows that all trees of the step share.
    budget_share: int = 1
    #: Most guessed tokens along one path; 0 is no speculation.
    max_depth: int = 0


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one step computes."""

    items: tuple[ScheduledRequest, ...] = ()
    #: Rows that all trees of the step may use together, roots included.
    tree_budget: int = 0

    @property
    def speculates(self) -> bool:
        """True when some tree may hold more than its root."""
        return any(item.max_tree_nodes > 1 for item in self.items)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What the passes of a step gave; K and V of the paths are where they belong."""

    #: One per item; their sizes alone may be known.
    trees: Sequence[DraftTree]
    #: The accepted path of each item that chooses a token; None for the others.
    paths: Sequence[AcceptedPath | None]


#: Drafts, builds, verifies, accepts, and moves K and V. The host learns of nothing but the outcome.
Compute = Callable[[StepPlan], StepOutcome]


@dataclass(frozen=True, kw_only=True)
class TreeRecord:
    """What one request's step did, for tracing."""

    request_id: str
    tree: DraftTree
    #: Accepted nodes, root first.
    accepted_nodes: list[int]
    #: Tokens that were committed: accepted guesses, then the bonus, cut where the request stopped.
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step did, for tracing."""

    step: int
    requests: list[TreeRecord]


class EngineLostError(BaseException):
    """The engine cannot go on, and what became of its requests is not known: only its process can end."""


class Drafter(Protocol):
    """Guesses continuations. Any guess is lossless; a wrong one costs speed alone."""

    #: Target layers whose outputs the drafter reads; empty when it reads none.
    tap_layer_ids: tuple[int, ...]
    #: Guessed tokens along one path at most.
    max_depth: int
    #: Rows behind the committed tokens that drafting writes into a request's pages.
    num_scratch_rows: int
    #: Grows when the draft context of all requests is lost.
    epoch: int

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """What is kept of a committed token: ``[n, num_taps * hidden_size]`` to ``[n, hidden_size]``."""

    def absorb(self, requests: Sequence[Request]) -> None:
        """Moves the pending fused vectors of these requests into their draft context."""

    def draft(self, plan: StepPlan) -> list[CandidateTable | None]:
        """One table per item of the plan; None is no guess."""


#: Makes one tree per item from the drafter's tables.
TreeBuilder = Callable[[StepPlan, Sequence["CandidateTable | None"]], list[DraftTree]]


#: Accepted paths of the items that choose a token, from their root's row in the logits, their trees and the logits.
Acceptor = Callable[[Sequence[ScheduledRequest], Sequence[int], Sequence[DraftTree], torch.Tensor], list[AcceptedPath]]


class BudgetPolicy(Protocol):
    """Decides how large trees are."""

    def nodes_per_tree(self, num_decoding: int) -> int:
        """Tree nodes, root included, that one of `num_decoding` requests gets; 1 is no speculation."""


class FixedBudget:
    """The same tree size at every load."""

    def __init__(self, num_nodes: int):
        self._num_nodes = num_nodes

    def nodes_per_tree(self, num_decoding: int) -> int:
        """The fixed number."""
        return self._num_nodes
