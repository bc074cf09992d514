"""An engine whose target and draft head are split over ranks: rank 0 decides, every rank computes.

Rank 0 runs the whole engine. What its runners are about to compute they first announce on a channel, so that every
other rank, in `Follower.run`, enters the same collectives with its own part of weights and KV: each pass by itself, or
a step on static buffers as a whole, whose collectives are among its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from jetflow_cluster.engine.batch import StepBatch
from jetflow_cluster.engine.bucket import Bucket
from jetflow_cluster.engine.draft_runner import ContextRows, DraftBlocks, HeadDrafter
from jetflow_cluster.engine.graph_runner import Announce
from jetflow_cluster.engine.prompt_rows import PromptNumbers
from jetflow_cluster.engine.protocols import EngineLostError
from jetflow_cluster.engine.recorded_steps import RecordedSteps
from jetflow_cluster.engine.target_runner import TargetRunner
from jetflow_cluster.models.batch import ForwardBatch
from jetflow_cluster.parallel.channel import FollowerChannel, LeaderChannel
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.tree_attention import TreeAttentionPlan, plan_tree_attention


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A `ForwardBatch` in plain numbers."""

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    query_lens: list[int]
    context_lens: list[int]
    page_table: list[list[int]]
    parents: list[int]
    is_chain: list[bool]
    bidirectional: bool

    @classmethod
    def of(cls, batch: ForwardBatch) -> Rows:
        """What a batch is made of."""
        plan = batch.attention
        assert isinstance(plan, TreeAttentionPlan)
        return cls(
            token_ids=batch.token_ids.tolist(),
            positions=batch.positions.tolist(),
            slots=batch.slot_mapping.tolist(),
            query_lens=plan.query_lens,
            context_lens=plan.context_lens,
            page_table=plan.page_table.tolist(),
            parents=plan.parents.tolist(),
            is_chain=plan.is_chain,
            bidirectional=plan.bidirectional,
        )

    def batch(self, page_size: int, device: torch.device) -> ForwardBatch:
        """The batch again, on this rank's device."""
        ids, positions, slots = (
            torch.tensor(numbers, dtype=torch.int64, device=device)
            for numbers in (self.token_ids, self.positions, self.slots)
        )
        attention = plan_tree_attention(
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            page_table=torch.tensor(self.page_table, dtype=torch.int32, device=device),
            parents=torch.tensor(self.parents, dtype=torch.int32, device=device),
            page_size=page_size,
            bidirectional=self.bidirectional,
            is_chain=self.is_chain,
        )
        return ForwardBatch(
            token_ids=ids,
            positions=positions,
            slot_mapping=slots,
            attention=attention,
            max_position=max(self.positions, default=None),
        )


@dataclass(frozen=True, kw_only=True)
class Verify:
    """One pass of the target."""

    rows: Rows
    logits_rows: list[int]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Moves of KV slots."""

    source_slots: list[int]
    target_slots: list[int]


@dataclass(frozen=True, kw_only=True)
class Absorb:
    """Context rows of the draft head; their fused vectors follow as a broadcast."""

    positions: list[int]
    slots: list[int]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One pass of the draft head."""

    rows: Rows
    num_slots: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step on static buffers, whose inputs follow as its first broadcast."""

    bucket: Bucket
    prompts: PromptNumbers | None


@contextmanager
def together() -> Iterator[None]:
    """Ranks that did not all do the same are out of step for good.

    Raises:
        EngineLostError: in place of whatever went wrong.
    """
    try:
        yield
    except Exception as error:
        raise EngineLostError(f"{type(error).__name__}: {error}") from error


class LeadingTarget(TargetRunner):
    """Rank 0's part of the target, and the announcement of what it does."""

    def __init__(self, *args: object, channel: LeaderChannel, **options: object):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._channel = channel

    def verify(
        self, batch: StepBatch, tap_layer_ids: tuple[int, ...]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See `TargetRunner.verify`."""
        with together():
            self._channel.send(Verify(rows=Rows.of(batch.forward), logits_rows=batch.logits_rows))
            return super().verify(batch, tap_layer_ids)

    def commit(self, source_slots: list[int], target_slots: list[int]) -> None:
        """See `TargetRunner.commit`."""
        if source_slots:
            self._channel.defer(Commit(source_slots=source_slots, target_slots=target_slots))
            super().commit(source_slots, target_slots)


class LeadingDrafter(HeadDrafter):
    """Rank 0's part of the draft head, and the announcement of what it does."""

    def __init__(self, *args: object, channel: LeaderChannel, tp: TpGroup, **options: object):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._channel, self._tp = channel, tp

    def absorb_rows(self, rows: ContextRows) -> None:
        """See `HeadDrafter.absorb_rows`."""
        with together():
            self._channel.send(Absorb(positions=rows.positions, slots=rows.slots))
            self._tp.broadcast(rows.fused)
            super().absorb_rows(rows)

    def block_logits(self, blocks: DraftBlocks) -> torch.Tensor:
        """See `HeadDrafter.block_logits`."""
        with together():
            self._channel.send(Draft(rows=Rows.of(blocks.batch), num_slots=blocks.num_slots))
            return super().block_logits(blocks)


def announcing(channel: LeaderChannel) -> Announce:
    """What rank 0 announces steps on static buffers by."""

    @contextmanager
    def announce(bucket: Bucket, prompts: PromptNumbers | None) -> Iterator[None]:
        with together():
            channel.send(Step(bucket=bucket, prompts=prompts))
            yield

    return announce


class Follower:
    """Every other rank: does what rank 0 announces. `steps` are there if rank 0 has them."""

    def __init__(
        self,
        target: TargetRunner,
        drafter: HeadDrafter | None,
        channel: FollowerChannel,
        tp: TpGroup,
        steps: RecordedSteps | None = None,
    ):
        self._target, self._drafter, self._channel, self._tp = target, drafter, channel, tp
        self._device, self._steps = target.device, steps
        #: Told what begins, and an empty name when the leader is waited for.
        self.on_stage: Callable[[str], None] = lambda stage: None

    def run(self) -> None:
        """Until the leader closes the channel.

        Raises:
            ChannelClosedError: the leader is gone.
        """
        with torch.inference_mode():
            while (commands := self._channel.receive()) is not None:
                for command in commands:
                    self.on_stage(type(command).__name__.lower())
                    self._obey(command)
                self.on_stage("")

    def _obey(self, command: Verify | Commit | Absorb | Draft | Step) -> None:
        match command:
            case Step():
                if self._steps is None:
                    raise RuntimeError("the leader records steps, and this rank does not")
                self._steps.get(command.bucket, is_replayed=command.prompts is None).run(command.prompts)
            case Verify():
                batch = command.rows.batch(self._target.page_size, self._device)
                self._target.verify_rows(batch, command.logits_rows, ())
            case Commit():
                self._target.commit(command.source_slots, command.target_slots)
            case Absorb():
                drafter = self._drafting()
                fused = drafter.empty_fused(len(command.positions))
                rows = ContextRows(fused=self._tp.broadcast(fused), positions=command.positions, slots=command.slots)
                drafter.absorb_rows(rows)
            case Draft():
                batch = command.rows.batch(self._target.page_size, self._device)
                self._drafting().block_logits(DraftBlocks(batch=batch, num_slots=command.num_slots))

    def _drafting(self) -> HeadDrafter:
        if self._drafter is None:
            raise RuntimeError("the leader drafts, and this rank has no draft head")
        return self._drafter
