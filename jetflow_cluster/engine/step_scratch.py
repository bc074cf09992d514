"""What recorded steps compute in and nobody reads behind the next one. One step runs at a time, so all share it."""

from __future__ import annotations

from functools import cached_property

import torch

from jetflow_cluster.engine.bucket import REQUESTS, ROWS, at_least


class StepScratch:
    """Room for the largest bucket, taken when a step first needs it.

    Args:
        max_requests: of a step.
        max_rows: of all trees of a step.
        vocab_size: V.
        dtype: of the logits.
        device: where the steps run.
    """

    def __init__(self, *, max_requests: int, max_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device):
        requests, rows = largest_bucket(max_requests, max_rows)
        self._shape = (requests, vocab_size)
        self._num_logits = rows + requests
        self._dtype, self._device = dtype, device

    @cached_property
    def logits(self) -> torch.Tensor:
        """Of a step's rows, then of its prompts' ends, ``[rows + requests, V]``; read before the next step."""
        return torch.empty(self._num_logits, self._shape[1], dtype=self._dtype, device=self._device)

    @cached_property
    def scores(self) -> torch.Tensor:
        """`WalkBuffers.scores` and its shortlist, float64 ``[2, requests, V]``."""
        return torch.zeros(2, *self._shape, dtype=torch.float64, device=self._device)


def largest_bucket(max_requests: int, max_rows: int) -> tuple[int, int]:
    """Requests and rows of the largest bucket that a step of so many may take."""
    return at_least(REQUESTS, max_requests), at_least(ROWS, max(max_rows, max_requests))
