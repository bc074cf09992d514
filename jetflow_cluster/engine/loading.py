"""From a configuration to an engine: checkpoints, memory plan, parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from jetflow_cluster.cache.page_pool import PagePool
from jetflow_cluster.cache.prefix_cache import PrefixCache
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.budget import FixedBudget
from jetflow_cluster.engine.draft_runner import HeadDrafter
from jetflow_cluster.engine.engine import Engine
from jetflow_cluster.engine.graph_runner import nobody_else, serve_from_graphs
from jetflow_cluster.engine.lookup import ContextLookup
from jetflow_cluster.engine.memory_plan import MemoryPlan
from jetflow_cluster.engine.planned_memory import plan_draft_worker, plan_memory
from jetflow_cluster.engine.protocols import BudgetPolicy, Drafter, TreeBuilder
from jetflow_cluster.engine.recorded_steps import RecordedSteps
from jetflow_cluster.engine.recording import CudaGraphs
from jetflow_cluster.engine.resolve import (
    HALF_DTYPES,
    arithmetic,
    compute_device,
    compute_draft_dtype,
    compute_dtype,
    describe_dtype,
    max_model_len,
    weights_dtype,
    why_no_graphs,
)
from jetflow_cluster.engine.scheduler import Scheduler
from jetflow_cluster.engine.target_runner import TargetRunner
from jetflow_cluster.engine.tensor_parallel import Follower, LeadingDrafter, LeadingTarget, announcing
from jetflow_cluster.models.draft_head import DraftFuser, DraftHead
from jetflow_cluster.models.hub import checkpoints
from jetflow_cluster.models.loader import (
    load_draft_head,
    load_fuser,
    load_sidecar,
    load_target,
    load_target_ends,
)
from jetflow_cluster.models.registry import TargetModel
from jetflow_cluster.models.sidecar import SideCar
from jetflow_cluster.models.tokenizer import read_tokenizer
from jetflow_cluster.parallel.channel import FollowerChannel, LeaderChannel
from jetflow_cluster.parallel.tp_group import TpGroup

_log = logging.getLogger(__name__)

#: Makes a drafter for ``(target, num_pages, page_size)``.
DrafterFactory = Callable[[TargetModel, int, int], Drafter]


@dataclass(frozen=True, kw_only=True)
class LoadedEngine:
    """An engine and what its front ends need to know."""

    engine: Engine
    #: None when the checkpoint has no ``tokenizer.json``.
    tokenizer: Tokenizer | None
    target_dir: Path
    max_model_len: int
    eos_token_ids: frozenset[int]
    #: What this rank holds on its device.
    memory: MemoryPlan


def load_engine(
    config: EngineConfig,
    *,
    tp: TpGroup | None = None,
    channel: LeaderChannel | None = None,
    budget: BudgetPolicy | None = None,
    drafter_factory: DrafterFactory | None = None,
    tree_builder: TreeBuilder | None = None,
) -> LoadedEngine:
    """Loads target and head and builds the engine.

    Args:
        config: what to load and how to run.
        tp: the ranks that share target and head, of which this process is rank 0; None is this process alone.
        channel: where the other ranks listen (`load_follower`); needed where there are any.
        budget: tree sizes; None is no speculation until one is set on the scheduler.
        drafter_factory: replaces the draft head by another source of guesses.
        tree_builder: replaces the exact trees.

    Raises:
        ValueError: head and target do not fit, or the memory does not hold one request; with the numbers.
        FileNotFoundError: a checkpoint is not there.
    """
    tp = tp or TpGroup.single()
    parts = _load_parts(config, tp, with_head=drafter_factory is None)
    target, num_pages = parts.target, parts.num_pages
    drafter: Drafter | None = None
    if drafter_factory is not None:
        drafter = drafter_factory(target, num_pages, config.page_size)
    elif parts.head is not None:
        drafter = parts.drafter(config.page_size) if channel is None else parts.leading_drafter(config, channel, tp)
    lookup = ContextLookup() if drafter is not None and config.context_lookup else None
    pool = PagePool(num_pages)
    prefix_cache = PrefixCache(pool, config.page_size) if config.enable_prefix_cache else None
    scheduler = Scheduler(
        pool,
        prefix_cache,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_prompt_chunk=config.max_prompt_chunk,
        max_num_requests=config.max_num_requests,
        max_draft_depth=max(part.max_depth if part else 0 for part in (drafter, lookup)),
        num_scratch_rows=drafter.num_scratch_rows if drafter else 0,
        needs_draft_context=bool(drafter and drafter.tap_layer_ids),
        budget=budget or FixedBudget(1),
    )
    runner = parts.runner(config.page_size, channel)
    engine = Engine(runner, drafter, scheduler, prefix_cache=prefix_cache, lookup=lookup, tree_builder=tree_builder)
    reason = why_no_graphs(config, target.device, tp)
    if drafter_factory is not None or tree_builder is not None:
        reason = reason or "guesses or trees come from elsewhere"
    _replay(engine, parts.max_model_len, reason, tp, channel)
    return LoadedEngine(
        engine=engine,
        tokenizer=read_tokenizer(parts.target_dir),
        target_dir=parts.target_dir,
        max_model_len=parts.max_model_len,
        eos_token_ids=frozenset(target.config.eos_token_ids),
        memory=parts.memory,
    )


def _replay(engine: Engine, max_len: int, reason: str | None, tp: TpGroup, channel: LeaderChannel | None) -> None:
    """Has steps replayed, unless there is a reason against it."""
    _log.info("steps are %s", "replayed from CUDA graphs" if reason is None else f"computed launch by launch: {reason}")
    if reason is None:
        announce = announcing(channel) if channel is not None else nobody_else
        recorder = CudaGraphs(engine.target.device)
        serve_from_graphs(engine, max_len=max_len, recorder=recorder, tp=tp, announce=announce)


def load_follower(config: EngineConfig, *, tp: TpGroup, channel: FollowerChannel, with_head: bool = True) -> Follower:
    """This rank's part of what `load_engine` builds on rank 0; all ranks load at the same time. Without a head where
    draft workers have it.

    Raises:
        ValueError: as `load_engine` does.
        FileNotFoundError: as `load_engine` does.
    """
    parts = _load_parts(config, tp, with_head=with_head)
    runner = parts.runner(config.page_size, None)
    drafter = parts.drafter(config.page_size) if parts.head is not None else None
    steps: RecordedSteps | None = None
    if with_head and why_no_graphs(config, runner.device, tp) is None:
        steps = RecordedSteps(
            runner,
            drafter,
            max_requests=config.max_num_requests,
            max_rows=config.max_num_batched_tokens,
            recorder=CudaGraphs(runner.device),
            tp=tp,
        )
    return Follower(runner, drafter, channel, tp, steps)


def load_draft_worker(config: EngineConfig, *, num_pages: int) -> HeadDrafter:
    """A draft head with its own copy of the target's embedding and output layer, for a dedicated worker.

    Args:
        config: the target's engine's.
        num_pages: pages of the target's KV cache, whose ids the draft context shares.

    Raises:
        ValueError: there is no draft head, or it does not fit the target.
        FileNotFoundError: a checkpoint is not there.
    """
    target_dir, head_dir = checkpoints(config)
    if head_dir is None:
        raise ValueError("draft_head = None: a draft worker needs a head")
    device = compute_device(config)
    _log.info("memory of a draft worker\n%s", plan_draft_worker(config, num_pages).text())
    ends = load_target_ends(
        target_dir,
        dtype=compute_dtype(config, device),
        device=device,
        rounded_to=weights_dtype(config, device),
    )
    dtype = compute_draft_dtype(config, ends.dtype, device)
    head = load_draft_head(head_dir, ends.config, dtype=dtype, device=device, tp=TpGroup.single())
    sidecar = load_sidecar(head_dir, ends, device=device)
    return HeadDrafter(head, sidecar, ends, num_pages=num_pages, page_size=config.page_size)


def load_draft_fuser(config: EngineConfig, target: TargetModel) -> DraftFuser:
    """The part of the draft head that stays beside the target when dedicated workers have the rest, in their dtype.

    Raises:
        ValueError: there is no draft head, or it does not fit the target.
        FileNotFoundError: the checkpoint is not there.
    """
    _, head_dir = checkpoints(config)
    if head_dir is None:
        raise ValueError("draft_head = None: dedicated draft workers need a head")
    dtype = compute_draft_dtype(config, target.dtype, target.device)
    return load_fuser(head_dir, target, dtype=dtype, device=target.device)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What one rank holds."""

    target: TargetModel
    head: DraftHead | None
    sidecar: SideCar | None
    target_dir: Path
    max_model_len: int
    memory: MemoryPlan

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache, on every rank."""
        return self.memory.num_pages

    def runner(self, page_size: int, channel: LeaderChannel | None) -> TargetRunner:
        sizes = {
            "num_pages": self.num_pages,
            "page_size": page_size,
            "num_scratch_pages": self.memory.num_scratch_pages,
        }
        if channel is not None:
            return LeadingTarget(self.target, channel=channel, **sizes)
        return TargetRunner(self.target, **sizes)

    def drafter(self, page_size: int) -> HeadDrafter:
        assert self.head is not None
        return HeadDrafter(
            self.head,
            self.sidecar,
            self.target,
            num_pages=self.num_pages,
            page_size=page_size,
            num_scratch_pages=self.memory.num_scratch_pages,
        )

    def leading_drafter(self, config: EngineConfig, channel: LeaderChannel, tp: TpGroup) -> HeadDrafter:
        return LeadingDrafter(
            self.head,
            self.sidecar,
            self.target,
            num_pages=self.num_pages,
            page_size=config.page_size,
            num_scratch_pages=self.memory.num_scratch_pages,
            channel=channel,
            tp=tp,
        )


def _load_parts(config: EngineConfig, tp: TpGroup, *, with_head: bool) -> _Parts:
    if config.tensor_parallel_size != tp.size:
        raise ValueError(
            f"tensor_parallel_size = {config.tensor_parallel_size}: this engine runs on {tp.size} rank(s); "
            "an in-process engine has 1"
        )
    target_dir, head_dir = checkpoints(config)
    device = compute_device(config)
    _log.info("computes in %s", arithmetic(config))
    memory = plan_memory(config, tp, with_head=with_head)
    _log.info("memory of rank %d\n%s", tp.rank, memory.text())
    _log.log(logging.WARNING if config.dtype in HALF_DTYPES else logging.INFO, describe_dtype(config, device))
    target = load_target(
        target_dir,
        dtype=compute_dtype(config, device),
        device=device,
        tp=tp,
        rounded_to=weights_dtype(config, device),
    )
    head, sidecar = None, None
    if with_head and head_dir is not None:
        draft_dtype = compute_draft_dtype(config, target.dtype, device)
        head = load_draft_head(head_dir, target, dtype=draft_dtype, device=device, tp=tp)
        sidecar = load_sidecar(head_dir, target, device=device)
    return _Parts(
        target=target,
        head=head,
        sidecar=sidecar,
        target_dir=target_dir,
        max_model_len=max_model_len(config, target.config),
        memory=memory,
    )
