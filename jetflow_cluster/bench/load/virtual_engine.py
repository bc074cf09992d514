"""The engine's scheduler and budget policy over synthetic guesses, on the clock of a cost model.

Everything that decides is the engine's own: scheduling, who drafts, tree building at a price, calibration, the upkeep
of the cost model. Nothing is computed: a step takes what the cost model says, and guesses are right as often as their
scores say.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch

from jetflow_cluster.bench.load.ramp import StepSeen
from jetflow_cluster.cache.page_pool import PagePool
from jetflow_cluster.cache.page_table import PageTable
from jetflow_cluster.cache.prefix_cache import PageKeys
from jetflow_cluster.engine.cost_model import CostModel, StepShape
from jetflow_cluster.engine.draft_choice import NODES, Gains
from jetflow_cluster.engine.priced_budget import PricedBudget
from jetflow_cluster.engine.protocols import ScheduledRequest, StepPlan
from jetflow_cluster.engine.request import Request
from jetflow_cluster.engine.scheduler import Scheduler
from jetflow_cluster.engine.trees import build_planned_trees
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.build import CandidateTable, build_trees, to_fixed_point
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

_PAGE_SIZE, _MAX_LEN = 16, 4096
_NUM_TRIALS = 300


@dataclass(frozen=True, kw_only=True)
class GuessProfile:
    """How good synthetic guesses are."""

    depth: int = 7
    width: int = 8
    #: The best candidate's probability at each depth is beta-distributed with these parameters.
    alpha: float = 1.9
    beta: float = 0.75
    #: Each further candidate has this share of what the one before left.
    share: float = 0.45


@dataclass(frozen=True, kw_only=True)
class RampRequests:
    """What the ramp's requests ask for."""

    num_prompt_tokens: int = 64
    #: Output tokens, uniformly between these.
    min_output: int = 64
    max_output: int = 192


class Guesser:
    """Draws candidate tables, and which candidate is right."""

    def __init__(self, profile: GuessProfile, seed: int):
        self.profile = profile
        self._rng = np.random.default_rng(seed)
        self._ids = torch.arange(1, profile.depth * profile.width + 1).view(profile.depth, profile.width)

    def table(self) -> CandidateTable:
        """One request's guesses; ids are distinct and above 0."""
        profile = self.profile
        first = self._rng.beta(profile.alpha, profile.beta, size=profile.depth)
        rest = (1 - profile.share) ** np.arange(profile.width - 1) * profile.share
        probs = np.concatenate([first[:, None], (1 - first)[:, None] * rest], axis=1)
        order = np.sort(probs, axis=1)[:, ::-1].copy()
        return CandidateTable(ids=self._ids, scores=to_fixed_point(torch.from_numpy(np.log(order)))[:, None, :])

    def walk(self, tree: DraftTree, table: CandidateTable | None) -> AcceptedPath:
        """What a target would accept whose tokens are those candidates with their probabilities; 0 is any other."""
        nodes: list[int] = [0]
        token_ids: list[int] = []
        while table is not None and len(nodes) <= table.ids.shape[0]:
            depth = len(nodes) - 1
            right = self._right(table, depth)
            children = [i for i, parent in enumerate(tree.parents) if i and parent == nodes[-1]]
            token = int(table.ids[depth, right]) if right is not None else 0
            child = next((i for i in children if tree.token_ids[i] == token), None)
            if child is None:
                return AcceptedPath(nodes=nodes, token_ids=[*token_ids, token])
            nodes.append(child)
            token_ids.append(token)
        return AcceptedPath(nodes=nodes, token_ids=[*token_ids, 0])

    def _right(self, table: CandidateTable, depth: int) -> int | None:
        probs = np.exp(table.scores[depth, 0].numpy() / (1 << 16))
        index = int(np.searchsorted(np.cumsum(probs), self._rng.random()))
        return index if index < len(probs) else None

    def gains(self) -> Gains:
        """Accepted tokens by tree size and depth, from trials."""
        total = np.zeros((len(NODES), self.profile.depth))
        for _ in range(_NUM_TRIALS):
            table = self.table()
            (tree,) = build_trees([table], [0], max_nodes=[NODES[-1]], max_depths=[self.profile.depth])
            depths = np.array(tree.depths)
            is_right = np.zeros(len(depths), bool)
            is_right[self.walk(tree, table).nodes[1:]] = True
            for d in range(1, self.profile.depth + 1):
                hit = is_right & (depths <= d)
                total[:, d - 1] += [hit[:n].sum() for n in NODES]
        return Gains(accepted=total / _NUM_TRIALS)


class VirtualEngine:
    """Implements `RampedEngine`.

    Args:
        mode: ``auto`` or ``off``.
        cost: what steps really take; the policy starts from it.
        guess: how good guesses are.
        requests: what is asked.
        noise: standard deviation of a step's time, as a share.
        max_num_requests: most that run.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        mode: SpeculationMode,
        cost: CostModel,
        *,
        guess: GuessProfile | None = None,
        requests: RampRequests | None = None,
        noise: float = 0.03,
        max_num_requests: int = 64,
        seed: int = 0,
    ):
        self._mode, self._cost, self._noise = mode, cost, noise
        self._asked = requests or RampRequests()
        self._guesser = Guesser(guess or GuessProfile(), seed)
        self._rng = np.random.default_rng([seed, 1])
        self._lengths = np.random.default_rng([seed, 2])
        self.budget = PricedBudget(cost, self._guesser.gains(), needs_context=True)
        pages = max_num_requests * (-(-(self._asked.num_prompt_tokens + self._asked.max_output) // _PAGE_SIZE) + 8)
        self.pool = PagePool(pages)
        self.scheduler = Scheduler(
            self.pool,
            None,
            max_num_batched_tokens=2048,
            max_prompt_chunk=None,
            max_num_requests=max_num_requests,
            max_draft_depth=self._guesser.profile.depth,
            num_scratch_rows=self._guesser.profile.depth + 1,
            needs_draft_context=True,
            budget=self.budget,
        )
        self._count = itertools.count()
        self._now_s = 0.0

    @property
    def num_active(self) -> int:
        """See `RampedEngine`."""
        return len(self.scheduler.running) + len(self.scheduler.waiting)

    def add(self) -> None:
        """See `RampedEngine`."""
        index = next(self._count)
        asked = self._asked
        params = SamplingParams(
            temperature=0.0,
            max_tokens=int(self._lengths.integers(asked.min_output, asked.max_output + 1)),
            ignore_eos=True,
            speculation=SpeculationOptions(mode=self._mode),
        )
        request = Request(
            request_id=f"ramp-{index}",
            prompt_token_ids=[0] * asked.num_prompt_tokens,
            params=params,
            seed=index,
            arrival=index,
            pages=PageTable(self.pool, _PAGE_SIZE),
            keys=PageKeys(_PAGE_SIZE),
            detokenizer=None,
            eos_token_ids=frozenset(),
            max_len=_MAX_LEN,
        )
        self.scheduler.add(request)

    def step(self) -> StepSeen:
        """See `RampedEngine`."""
        plan = self.scheduler.schedule()
        tables = [self._guesser.table() if item.asks_head else None for item in plan.items]
        priced, calibrated = self.budget.price(plan, tables)
        trees = build_planned_trees(priced, calibrated)
        paths = [
            self._guesser.walk(tree, table) if item.is_last else None
            for item, tree, table in zip(plan.items, trees, tables, strict=True)
        ]
        shape = _shape(plan, trees)
        luck = float(np.exp(self._noise * self._rng.standard_normal()))
        took_s = luck * self._cost.step_s(shape)
        num_tokens = 0
        self.budget.observe(priced, trees, paths, took_s)
        for item, tree, path in zip(plan.items, trees, paths, strict=True):
            num_tokens += self._commit(item, tree, path)
        self._now_s += took_s
        num_first = sum(path is not None and item.num_rows > 1 for item, path in zip(plan.items, paths, strict=True))
        return StepSeen(
            ended_s=self._now_s,
            num_tokens=num_tokens,
            num_decoding=shape.num_requests,
            num_rows=shape.num_rows,
            took_s=took_s,
            off_s=luck * _off_s(self._cost, shape, num_tokens - num_first),
        )

    def _commit(self, item: ScheduledRequest, tree: DraftTree, path: AcceptedPath | None) -> int:
        """Moves a request on; returns its new tokens."""
        request = item.request
        num_rows = len(path.nodes) if path is not None and item.num_rows == 1 else item.num_rows
        if item.asks_head:
            request.draft_len = request.fused_len
        if item.keeps_context:
            request.keep_context(num_rows)
        if path is None:
            request.num_computed += item.num_rows
            return 0
        kept = len(request.append(path.token_ids).token_ids)
        request.num_computed += kept if item.num_rows == 1 else item.num_rows
        if item.num_rows == 1:
            request.speculation.record(tree.num_nodes - 1, min(kept, path.num_accepted))
        if request.finish_reason is not None:
            self.scheduler.finish(request)
        return kept


def _off_s(cost: CostModel, shape: StepShape, num_decoded: int) -> float:
    """Seconds that the decoding requests would take for these tokens at one per step, with the prompts beside."""
    num = shape.num_requests
    alone = StepShape(num_requests=num, num_rows=num, num_context_tokens=shape.num_context_tokens)
    with_prompts = replace(alone, num_prompt_rows=shape.num_prompt_rows)
    decode_s = cost.step_s(alone)
    steps = num_decoded / num if num else 1.0
    return cost.step_s(with_prompts) - decode_s + steps * decode_s


def _shape(plan: StepPlan, trees: list[DraftTree]) -> StepShape:
    """What a step computes; the contexts are those before it."""
    decoding = [i for i, item in enumerate(plan.items) if item.num_rows == 1 and item.is_last]
    asked = [plan.items[i] for i in decoding if plan.items[i].asks_head]
    return StepShape(
        num_requests=len(decoding),
        num_rows=sum(trees[i].num_nodes for i in decoding),
        num_context_tokens=sum(plan.items[i].request.num_computed for i in decoding),
        num_draft_rows=len(asked) * (1 + max((item.head_depth for item in asked), default=0)),
        num_draft_context_tokens=sum(item.request.num_computed for item in asked),
        num_prompt_rows=sum(item.num_rows for item in plan.items) - len(decoding),
    )
