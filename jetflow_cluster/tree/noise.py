"""Gumbel noise that depends on nothing but (seed, position, token id, sample index).

Counter-based: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as
key and (position, token id, sample index, 0) as counter. Whoever knows the seed can draw the noise of any token at
any position, in any order and on any device; drafter and target do so independently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10


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
    keys0, keys1 = _key_schedule(key0, _WEYL_0), _key_schedule(key1, _WEYL_1)
    for k0, k1 in zip(keys0, keys1, strict=True):
        # int64 products wrap, which leaves all 64 bits of the unsigned product in place; c1 and c3 may carry
        # garbage above bit 31 until the next mask, because they enter nothing but an exclusive or.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
    return c0, c1 & _MASK, c2, c3 & _MASK


def _key_schedule(key: int | torch.Tensor, weyl: int) -> Sequence[int | torch.Tensor]:
    """The key word of each round."""
    if isinstance(key, int):
        return [(key + i * weyl) & _MASK for i in range(_NUM_ROUNDS)]
    steps = torch.arange(_NUM_ROUNDS, device=key.device) * weyl
    return ((key + steps.view(-1, *[1] * key.dim())) & _MASK).unbind(0)


def gumbel_noise(
    seed: int | torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, sample_index: int = 0
) -> torch.Tensor:
    """Standard Gumbel noise, ``-log(-log((x + 0.5) / 2^32))`` with x the first Philox word.

    Args:
        seed: an integer in [0, 2^64), or int64 seeds (two's complement of the unsigned value) that broadcast.
        positions: absolute positions of the tokens to be chosen, int64 in [0, 2^32).
        token_ids: int64 in [0, 2^32), on the same device.
        sample_index: number of an independent sample of the same request.

    Returns:
        float64, of the shape to which seeds, positions and token ids broadcast.
    """
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    zero = torch.zeros((), dtype=torch.int64, device=token_ids.device)
    word = philox_4x32_10(positions, token_ids, zero + sample_index, zero, key0, key1)[0]
    uniform = word.to(torch.float64).add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()
