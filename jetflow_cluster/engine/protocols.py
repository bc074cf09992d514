"""What the engine asks of its parts, where more than one implementation exists."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from jetflow_cluster.config import MAX_WIDTH
from jetflow_cluster.engine.request import Request
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.tree.lookup import LONE_MATCH
from jetflow_cluster.types import SpeculationMode


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
    #: Most tokens that the head guesses along one path; None is `max_depth`. Other sources may guess deeper.
    draft_depth: int | None = None
    #: Most candidates that the head offers at each depth; None is as many as the tree has room for.
    draft_width: int | None = None
    #: Whether the draft head may be asked to guess; other sources may be in any case.
    uses_head: bool = True
    #: Shortest match of the request's own text that guesses where the head does not.
    least_match: int = LONE_MATCH
    #: Whether the draft context goes on with these rows: their hidden vectors are kept.
    keeps_context: bool = False
    #: Added to this request's scores where requests compete and are priced, fixed point.
    bias: int = 0

    @property
    def head_depth(self) -> int:
        """Most tokens that the head guesses along one path."""
        return self.max_depth if self.draft_depth is None else min(self.max_depth, self.draft_depth)

    @property
    def head_width(self) -> int:
        """Candidates that the head offers at each depth."""
        room = min(MAX_WIDTH, self.max_tree_nodes - 1)
        return room if self.draft_width is None else min(room, self.draft_width)

    @property
    def is_forced(self) -> bool:
        """True when the request speculates whatever it costs."""
        return self.request.params.speculation.mode is SpeculationMode.FORCE

    @property
    def is_priced(self) -> bool:
        """True for a decoding request whose tree competes at the step's price; without one it is a bare root."""
        return self.num_rows == 1 and self.is_last and not self.is_forced

    @property
    def asks_head(self) -> bool:
        """True when the draft head shall guess, and has the context for it."""
        return self.max_tree_nodes > 1 and self.uses_head and self.request.has_draft_context


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one step computes."""

    items: tuple[ScheduledRequest, ...] = ()
    #: Rows that all trees of the step may use together, roots included.
    tree_budget: int = 0
    #: int64: what the step costs with n rows in the trees that are priced, those of decoding requests which do not
    #: force speculation; None is no price. See `jetflow_cluster.tree.build.build_trees`.
    row_costs: np.ndarray | None = None
    #: Decoding requests that are left out of this step, as half of them is guessed for while the others are verified.
    resting: tuple[Request, ...] = ()
    #: The next step's part of those that are guessed for.
    ahead: tuple[ScheduledRequest, ...] = ()

    @property
    def speculates(self) -> bool:
        """True when some tree may hold more than its root."""
        return any(item.max_tree_nodes > 1 for item in self.items)


class Source(enum.Enum):
    """Where a request's guesses in a step come from."""

    NONE = enum.auto()
    #: One token per depth, as a request's own text repeats itself.
    CHAIN = enum.auto()
    #: Several per depth, from a drafter.
    HEAD = enum.auto()


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What the passes of a step gave; K and V of the paths are where they belong."""

    #: One per item.
    trees: Sequence[DraftTree]
    #: The accepted path of each item that chooses a token; None for the others.
    paths: Sequence[AcceptedPath | None]
    #: Seconds that went into what later steps like it need no more, such as a recording.
    held_up_s: float = 0.0


#: Drafts, builds, verifies, accepts, and moves K and V. The host learns of nothing but the outcome. The second argument
#: is called once, behind everything that can be queued without the outcome, and before that is waited for.
Compute = Callable[[StepPlan, Callable[[], None]], StepOutcome]


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
    #: Rows of a guess for one request, whatever its depth; None where a shallow guess takes one row per depth and one.
    num_block_slots: int | None
    #: Grows when the draft context of all requests is lost.
    epoch: int

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """What is kept of a committed token: ``[n, num_taps * hidden_size]`` to ``[n, hidden_size]``."""

    def absorb(self, requests: Sequence[Request]) -> None:
        """Moves the pending fused vectors of these requests into their draft context."""

    def draft(self, plan: StepPlan) -> list[CandidateTable | None]:
        """One table per item of the plan; None is no guess."""


@runtime_checkable
class AheadDrafter(Drafter, Protocol):
    """A drafter elsewhere, which guesses while this process does other work. One plan at a time is asked about."""

    def ask(self, plan: StepPlan) -> None:
        """Begins what `draft` does."""

    def answer(self) -> list[CandidateTable | None]:
        """Ends it; for each item of the plan that was asked about."""


#: Makes one tree per item from the drafter's tables.
TreeBuilder = Callable[[StepPlan, Sequence["CandidateTable | None"]], list[DraftTree]]


#: Accepted paths of the items that choose a token, from their root's row in the logits, their trees and the logits.
Acceptor = Callable[[Sequence[ScheduledRequest], Sequence[int], Sequence[DraftTree], torch.Tensor], list[AcceptedPath]]


@dataclass(frozen=True, kw_only=True)
class DecodeLoad:
    """What a policy decides on."""

    #: Decoding requests in mode ``auto``, in the order of arrival.
    requests: Sequence[Request]
    #: All decoding requests.
    num_decoding: int
    #: Rows that one decoding request may use, so that all fit.
    fair_nodes: int
    #: Prompt tokens that the step will compute beside them, at most.
    num_prompt_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What one request may spend in a step. Fields as in `ScheduledRequest`."""

    max_tree_nodes: int = 1
    budget_share: int = 1
    max_depth: int | None = None
    draft_depth: int | None = None
    draft_width: int | None = None
    uses_head: bool = True
    least_match: int = LONE_MATCH
    keeps_context: bool = True
    bias: int = 0


class BudgetPolicy(Protocol):
    """Decides who may speculate, and how much. Any decision is lossless."""

    #: Whether the draft contexts of prompts that are computed now shall go on.
    keeps_context: bool
    #: What the policy does at present, and why, in a word or two.
    reason: str
    #: Expected tokens per second below which a node is left out; 0 where there is no price.
    price_per_s: float
    #: Whether half of the requests that draft shall be guessed for while the others are verified. Only where drafters
    #: are elsewhere: see `AheadDrafter`.
    has_cohorts: bool

    @property
    def maps(self) -> np.ndarray | None:
        """What `price` maps the scores of priced requests with: int32 ``[2, NUM_DEPTHS, NUM_KNOTS]`` as
        `jetflow_cluster.engine.value_model.ValueModel` has them; None leaves them as they are."""

    def allow(self, load: DecodeLoad) -> list[Allowance]:
        """One allowance per request of the load."""

    def price(
        self, plan: StepPlan, tables: Sequence[CandidateTable | None]
    ) -> tuple[StepPlan, Sequence[CandidateTable | None]]:
        """The plan with the price of rows, and the tables with their scores calibrated, before trees are built."""

    def price_rows(self, plan: StepPlan, sources: Sequence[Source]) -> StepPlan:
        """The plan with the price of rows, where the tables are not on the host: for each item, where its guesses will
        come from. As `price`, but that nothing is calibrated."""

    def observe(
        self, plan: StepPlan, trees: Sequence[DraftTree], paths: Sequence[AcceptedPath | None], took_s: float
    ) -> None:
        """Told of each step behind its end."""
