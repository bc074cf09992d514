"""Calibration of scores on a device, as `jetflow_cluster.engine.value_model.apply_maps` does it on the host."""

from __future__ import annotations

import torch

from jetflow_cluster.engine.value_model import KNOT_SHIFT, NUM_DEPTHS, NUM_KNOTS
from jetflow_cluster.tree.build import MIN_SCORE


def calibrate_on_device(scores: torch.Tensor, maps: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Conditional scores through the map of each; no value is read by the host, and all arithmetic is of integers.

    Args:
        scores: int32 ``[R, D, P, W]``, at most 0; row d - 1 is depth d.
        maps: int32 ``[2, NUM_DEPTHS, NUM_KNOTS]``.
        kinds: int32 ``[R]``, 0 for greedy and 1 for sampled requests.

    Returns:
        int32 ``[R, D, P, W]`` within [`MIN_SCORE`, 0].
    """
    depths = torch.arange(scores.shape[1], device=scores.device).clamp_max(NUM_DEPTHS - 1)
    rows = kinds.long()[:, None] * NUM_DEPTHS + depths
    nats = -scores.long()
    knot = (nats >> KNOT_SHIFT).clamp_max(NUM_KNOTS - 2)
    at = rows[:, :, None, None] * NUM_KNOTS + knot
    flat = maps.flatten()
    low = flat.take(at).long()
    step = flat.take(at + 1).long() - low
    rest = nats - (knot << KNOT_SHIFT)
    unit = 1 << KNOT_SHIFT
    mapped = low + ((step * rest.clamp_max(unit)) >> KNOT_SHIFT) + (rest - unit).clamp_min(0)
    return (-mapped).clamp(MIN_SCORE, 0).to(torch.int32)
