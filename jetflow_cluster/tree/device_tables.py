"""Candidate tables of a batch whose sampling options are tensors, so that a device makes them by itself.

The rules are those of `jetflow_cluster.tree.coupled`, which serves requests that are known to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jetflow_cluster.tree.build import to_fixed_point
from jetflow_cluster.tree.coupled import POOL_SIZE, Correction, conditional_scores
from jetflow_cluster.tree.noise import gumbel_noise


@dataclass(frozen=True, kw_only=True)
class DraftNoise:
    """Of R requests; values may change between uses."""

    #: float64 ``[R]``; 0 is greedy.
    temperatures: torch.Tensor
    #: Keys of the noise, int64 ``[R]`` (two's complement).
    seeds: torch.Tensor
    #: Absolute positions of the anchors, int64 ``[R]``.
    anchor_positions: torch.Tensor


def device_tables(
    logits: torch.Tensor, width: int, noise: DraftNoise | None, sidecar: Correction | None, sharpness: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of each request; no value is read by the host.

    Args:
        logits: ``[R, D, V]`` of the head; row d - 1 is depth d.
        width: candidates per depth, at most V.
        noise: of requests that sample; None where all are greedy.
        sidecar: pairwise correction of the logits.
        sharpness: factor of greedy requests' logits at depths 2 and deeper.

    Returns:
        ids int64 ``[R, D, W]`` and fixed-point scores int32 ``[R, D, 1 or W, W]``.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    num_depths = logits.shape[1]
    is_sampled = None if noise is None else (noise.temperatures > 0)[:, None, None]
    if sharpness != 1.0:
        is_deep = (torch.arange(num_depths, device=logits.device) > 0)[None, :, None]
        is_sharp = is_deep if is_sampled is None else is_deep & ~is_sampled
        logits = torch.where(is_sharp, logits * sharpness, logits)
    logprobs = logits.log_softmax(-1)
    divisors: torch.Tensor | None = None
    if noise is None:
        top = logprobs.topk(width)
        ids, scores = top.indices, top.values
    else:
        assert is_sampled is not None
        divisors = torch.where(is_sampled, noise.temperatures[:, None, None], 1.0)
        ids, scores = _mixed(logprobs, width, noise, divisors, is_sampled)
    if sidecar is not None and num_depths > 1:
        scores = conditional_scores(ids, scores, sidecar, divisors)
    else:
        scores = scores.unsqueeze(2)
    return ids, to_fixed_point(scores)


def _mixed(
    logprobs: torch.Tensor, width: int, noise: DraftNoise, divisors: torch.Tensor, is_sampled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both kinds for every request, and for each the one that is its own."""
    pool = logprobs.topk(min(POOL_SIZE, logprobs.shape[2]))
    depths = torch.arange(1, logprobs.shape[1] + 1, device=logprobs.device)[:, None]
    positions = noise.anchor_positions[:, None, None] + depths
    drawn = gumbel_noise(noise.seeds[:, None, None], positions, pool.indices)
    noised = (drawn + pool.values / divisors).log_softmax(-1).topk(width)
    ids = torch.where(is_sampled, pool.indices.gather(-1, noised.indices), pool.indices[..., :width])
    return ids, torch.where(is_sampled, noised.values, pool.values[..., :width].double())
