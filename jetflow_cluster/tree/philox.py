"""Philox4x32-10, a counter-based generator, on tensors of any device.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MASK = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
NUM_ROUNDS = 10


def philox_4x32_10(
    c0: torch.Tensor,
    c1: torch.Tensor,
    c2: torch.Tensor,
    c3: torch.Tensor,
    key0: int | torch.Tensor,
    key1: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four pseudo-random words per counter.

    Args:
        c0, c1, c2, c3: counter words, int64 holding uint32, of shapes that broadcast.
        key0, key1: key words, integers or int64 tensors holding uint32 that broadcast with the counters.

    Returns:
        Four int64 tensors holding uint32; together they broadcast to the common shape.
    """
    keys0, keys1 = _key_schedule(key0, WEYL_0), _key_schedule(key1, WEYL_1)
    for k0, k1 in zip(keys0, keys1, strict=True):
        # int64 products wrap, which leaves all 64 bits of the unsigned product in place; c1 and c3 may carry
        # garbage above bit 31 until the next mask, because they enter nothing but an exclusive or.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & MASK, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & MASK, p0
    return c0, c1 & MASK, c2, c3 & MASK


def _key_schedule(key: int | torch.Tensor, weyl: int) -> Sequence[int | torch.Tensor]:
    """The key word of each round."""
    if isinstance(key, int):
        return [(key + i * weyl) & MASK for i in range(NUM_ROUNDS)]
    steps = torch.arange(NUM_ROUNDS, device=key.device) * weyl
    return ((key + steps.view(-1, *[1] * key.dim())) & MASK).unbind(0)
