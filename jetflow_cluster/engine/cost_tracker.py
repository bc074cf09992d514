"""Keeps a cost model current: a decayed regression of real step times on the parts that the model foretold."""

from __future__ import annotations

import numpy as np

from jetflow_cluster.engine.cost_model import PARTS, CostModel, StepShape

#: What is left of an observation's weight after each later one: half after 140 steps.
_FADE = 0.995
#: Observations that the model as it was measured counts for, per part.
_PRIOR_WEIGHT = 0.5
#: A step that took this many times what was foretold was held up by something else, and counts as this many.
_MOST = 2.0
#: Bounds of the scales.
_BOUNDS = (0.2, 5.0)
_SOLVE_EVERY = 8


class CostTracker:
    """The measured model and the scales of its parts that explain the last steps best.

    Parts that the present load does not tell apart keep their measured proportions.
    """

    def __init__(self, measured: CostModel):
        #: The model as it was measured.
        self.measured = measured
        #: The model as it stands.
        self.model = measured
        self._gram = np.zeros((len(PARTS), len(PARTS)))
        self._right = np.zeros(len(PARTS))
        self._scales = np.ones(len(PARTS))
        self._num_waiting = 0

    def observe(self, shape: StepShape, took_s: float) -> None:
        """Counts one step."""
        parts = np.array(self.measured.parts(shape))
        total = parts.sum()
        if total <= 0:
            return
        share = parts / total
        took = min(took_s, _MOST * float(parts @ self._scales)) / total
        self._gram = _FADE * self._gram + np.outer(share, share)
        self._right = _FADE * self._right + share * took
        self._num_waiting += 1
        if self._num_waiting >= _SOLVE_EVERY:
            self._num_waiting = 0
            prior = _PRIOR_WEIGHT * np.eye(len(PARTS))
            # Drawn towards one common scale, so that a slower machine is slower in all its parts.
            common = max(self._right.sum(), 1e-9) / max(self._gram.sum(), 1e-9)
            scales = np.linalg.solve(self._gram + prior, self._right + _PRIOR_WEIGHT * common)
            self._scales = np.clip(scales, *_BOUNDS)
            self.model = self.measured.scaled(self._scales.tolist())
