"""Which implementation serves a device."""

from __future__ import annotations

import torch

from jetflow_kernels.philox_gumbel.reference import philox_gumbel_reference
from jetflow_kernels.shipped import runs_triton


def philox_gumbel(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, ``-log(-log((x + 0.5) / 2^32))`` with x the first word of Philox4x32-10 of counter
    (position, token id, 0, 0) under the seed as key.

    Args:
        seeds: int64, two's complement of the unsigned seed.
        positions: int64 in [0, 2^32).
        token_ids: int64 in [0, 2^32).

    Returns:
        float64 of the shape to which the three broadcast. The words are the same on every device; logarithms may differ
        in their last bit.
    """
    seeds, positions, token_ids = torch.broadcast_tensors(seeds, positions, token_ids)
    if not runs_triton(token_ids.device):
        return philox_gumbel_reference(seeds, positions, token_ids)
    from jetflow_kernels.philox_gumbel.kernel import philox_gumbel_triton

    return philox_gumbel_triton(seeds.contiguous(), positions.contiguous(), token_ids.contiguous())
