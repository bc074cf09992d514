"""Gumbel noise that depends on nothing but (seed, position, token id, sample index).

Counter-based: Philox4x32-10 with the seed as key and (position, token id, sample index, 0) as counter. Whoever knows
the seed can draw the noise of any token at any position, in any order and on any device, so that the drafter knows
what the target will add.
"""

from __future__ import annotations

import torch

from jetflow_cluster.tree.philox import MASK, philox_4x32_10
from jetflow_cluster.tree.philox_cpu import philox_first_word
from jetflow_kernels.philox_gumbel import philox_gumbel

__all__ = ["as_signed", "gumbel_noise", "philox_4x32_10"]


def gumbel_noise(
    seed: int | torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, sample_index: int = 0
) -> torch.Tensor:
    """Standard Gumbel noise, ``-log(-log((x + 0.5) / 2^32))`` with x the first Philox word.

    Args:
        seed: an integer in [0, 2^64), or int64 seeds (two's complement of the unsigned value) that broadcast.
        positions: absolute positions of the tokens to be chosen, int64 in [0, 2^32).
        token_ids: int64 in [0, 2^32), on the same device.
        sample_index: number of an independent sample of the same request, in [0, 2^32).

    Returns:
        float64, of the shape to which seeds, positions and token ids broadcast.
    """
    if token_ids.device.type == "cuda" and sample_index == 0:
        # One launch in place of some hundred.
        if not isinstance(seed, torch.Tensor):
            seed = torch.full((), as_signed(seed), dtype=torch.int64, device=token_ids.device)
        return philox_gumbel(seed, positions, token_ids)
    key0, key1 = seed & MASK, (seed >> 32) & MASK
    if token_ids.device.type == "cpu":
        word = philox_first_word(positions, token_ids, sample_index, key0, key1)
    else:
        third = torch.full((), sample_index, dtype=torch.int64, device=token_ids.device)
        word = philox_4x32_10(positions, token_ids, third, torch.zeros_like(third), key0, key1)[0]
    uniform = word.to(torch.float64).add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()


def as_signed(seed: int) -> int:
    """The int64 whose two's complement is this unsigned 64-bit seed, as tensors hold it."""
    return seed - 2**64 if seed >= 2**63 else seed
