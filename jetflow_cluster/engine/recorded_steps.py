"""Static steps by bucket, each recorded when one is first needed: on all ranks the same, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from jetflow_cluster.engine.bucket import Bucket
from jetflow_cluster.engine.draft_runner import HeadDrafter
from jetflow_cluster.engine.prompt_rows import PromptNumbers
from jetflow_cluster.engine.recording import Recorder
from jetflow_cluster.engine.static_inputs import StaticInputs
from jetflow_cluster.engine.static_step import StaticStep
from jetflow_cluster.engine.step_scratch import StepScratch
from jetflow_cluster.engine.target_runner import TargetRunner
from jetflow_cluster.parallel.tp_group import TpGroup

#: Buckets whose steps are kept. Those that were not needed for longest give way, so that a server that has seen every
#: kind of batch holds no more memory than one that has seen some.
MAX_KEPT = 128


@dataclass(kw_only=True)
class RecordedStep:
    """The step of one bucket."""

    step: StaticStep
    inputs: StaticInputs
    #: None until a step without prompts needs it.
    replay: Callable[[], object] | None = None

    def run(self, prompts: PromptNumbers | None) -> torch.Tensor | None:
        """Queues it; beside prompts one launch at a time. Taps of the prompts' rows, where any are wanted."""
        if prompts is not None:
            return self.step.run(prompts.rows(self.step.target.page_size, self.step.target.device))
        assert self.replay is not None
        self.replay()
        return None


class RecordedSteps:
    """The steps of this rank.

    Args:
        target: with a scratch page.
        drafter: with a scratch page; None does not speculate.
        max_requests: running at a time.
        max_rows: of all trees of a step.
        recorder: of the device.
        tp: the ranks that share target and head.
    """

    def __init__(
        self,
        target: TargetRunner,
        drafter: HeadDrafter | None,
        *,
        max_requests: int,
        max_rows: int,
        recorder: Recorder,
        tp: TpGroup,
    ):
        self._target, self._drafter, self._recorder, self._tp = target, drafter, recorder, tp
        self._scratch = StepScratch(
            max_requests=max_requests,
            max_rows=max_rows,
            vocab_size=target.model.config.vocab_size,
            dtype=target.model.dtype,
            device=target.device,
        )
        #: The last needed is last.
        self.kept: dict[Bucket, RecordedStep] = {}

    def get(self, bucket: Bucket, *, is_replayed: bool) -> RecordedStep:
        """The bucket's step, recorded where it shall be replayed."""
        found = self.kept.pop(bucket, None)
        if found is None:
            while len(self.kept) >= MAX_KEPT:
                del self.kept[next(iter(self.kept))]
            step = StaticStep(bucket, self._target, self._drafter, self._scratch, self._tp)
            inputs = StaticInputs(step, self._target.scratch_slot // self._target.page_size)
            found = RecordedStep(step=step, inputs=inputs)
        self.kept[bucket] = found
        if is_replayed and found.replay is None:
            found.inputs.clear()
            found.replay = self._recorder.record(found.step.run)
            # Nobody goes on before all have recorded, so that the wait is not the step's.
            self._tp.smallest(0)
        return found
