"""Which tokens a sampled row may choose: top-k, then top-p over what is left, then min-p.

Both top-k and top-p keep the first n tokens by score, the lower id first where scores are equal; so one kept number
per row decides, and only rows that need it are sorted, no further than their nucleus reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from jetflow_cluster.types import SamplingParams

#: Values of a row that are sorted first; eight times as many whenever they do not hold the nucleus.
_FIRST_SORTED = 256


def apply_filters(scores: torch.Tensor, params: Sequence[SamplingParams]) -> bool:
    """Sets dropped tokens to -inf, in place; returns whether any filter was on.

    Args:
        scores: float64 ``[S, V]``, behind the temperature.
        params: one per row.
    """
    vocab_size = scores.shape[1]
    ranked = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size or p.top_p < 1.0]
    if ranked:
        rows = torch.tensor(ranked, device=scores.device) if len(ranked) < len(params) else None
        part = scores if rows is None else scores[rows]
        part.masked_fill_(~_ranked_mask(part, [params[i] for i in ranked]), -math.inf)
        if rows is not None:
            scores[rows] = part
    has_min_p = any(p.min_p > 0.0 for p in params)
    if has_min_p:
        shares = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
        floor = torch.tensor(shares, dtype=scores.dtype, device=scores.device).unsqueeze(1)
        floor += scores.amax(1, keepdim=True)
        scores.masked_fill_(scores < floor, -math.inf)
    return bool(ranked) or has_min_p


def best_mask(scores: torch.Tensor, num_kept: torch.Tensor, last_kept: torch.Tensor) -> torch.Tensor:
    """bool ``[S, V]``: the first n tokens of each row by score, the lower id first where scores are equal.

    Args:
        scores: ``[S, V]``.
        num_kept: int64 ``[S, 1]``, n.
        last_kept: ``[S, 1]``, the n-th best score.
    """
    above, tied = scores > last_kept, scores == last_kept
    room = num_kept - above.sum(1, keepdim=True)
    return above | (tied & (tied.cumsum(1) <= room))


def _ranked_mask(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """bool ``[S, V]``: what top-k and top-p keep."""
    vocab_size, device = scores.shape[1], scores.device
    limits = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    top_k = torch.tensor(limits, device=device).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], dtype=scores.dtype, device=device).unsqueeze(1)
    num_sorted = max(min(limit, _FIRST_SORTED) if limit == vocab_size else limit for limit in limits)
    while True:
        best = scores.topk(num_sorted).values
        weights = (best - best[:, :1]).exp()
        mass = weights.cumsum(1)
        total = mass.gather(1, top_k.clamp(max=num_sorted) - 1)
        if vocab_size in limits:
            whole = (scores - best[:, :1]).exp().sum(1, keepdim=True)
            total = torch.where(top_k == vocab_size, whole, total)
        needed = top_p * total
        if num_sorted == vocab_size or bool(((top_k <= num_sorted) | (mass[:, -1:] >= needed)).all()):
            break
        num_sorted = min(vocab_size, 8 * num_sorted)
    # A token stays while the mass of those before it is short of top_p.
    in_nucleus = 1 + (mass[:, :-1] < needed).sum(1, keepdim=True)
    num_kept = torch.where(top_p < 1.0, torch.minimum(in_nucleus, top_k), top_k)
    return best_mask(scores, num_kept, best.gather(1, num_kept - 1))
