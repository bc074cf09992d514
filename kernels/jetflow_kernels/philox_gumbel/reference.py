"""The definition, in 64-bit integers (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3")."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def philox_first_word(positions: torch.Tensor, token_ids: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """The first word of Philox4x32-10 with counter (position, token id, 0, 0) and the seed as key, int64."""
    x0, x1, x2, x3 = positions, token_ids, torch.zeros_like(token_ids), torch.zeros_like(token_ids)
    k0, k1 = seeds & _MASK, (seeds >> 32) & _MASK
    for _ in range(10):
        # Products wrap, and all 64 bits of the unsigned product are there.
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = ((p1 >> 32) & _MASK) ^ x1 ^ k0, p1 & _MASK
        x2, x3 = ((p0 >> 32) & _MASK) ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return x0


def philox_gumbel_reference(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """See `jetflow_kernels.philox_gumbel.philox_gumbel`."""
    uniform = (philox_first_word(positions, token_ids, seeds).double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log()
