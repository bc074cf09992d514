"""From a draft head's logits to candidate tables: greedy, coupled to the sampling noise, and with a side-car.

A sampled request's token is ``argmax(score + noise)``, and the drafter knows the noise. Its candidates are therefore
ranked by ``log q / temperature + noise``, so that the tree guesses the token that the target will draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from jetflow_cluster.tree.build import CandidateTable, to_fixed_point
from jetflow_cluster.tree.noise import as_signed, gumbel_noise
from jetflow_kernels.cpu.candidates import draft_candidates

#: Most probable tokens per depth among which a sampled request's candidates are chosen. Noise lifts improbable tokens:
#: against 64, acceptance grows by 8 %, and drafting takes a third of a millisecond more on a CPU.
POOL_SIZE = 512
#: Floor of the mass outside the candidates, which rounding can push below zero.
_LEAST_REST = 1e-12


class Correction(Protocol):
    """Pairwise correction of logits: ``<parent[p], child[c]>`` is added to that of token c behind token p."""

    @property
    def parent(self) -> torch.Tensor:
        """``[V, rank]``."""
        ...

    @property
    def child(self) -> torch.Tensor:
        """The same shape."""
        ...


@dataclass(frozen=True, kw_only=True)
class DraftSampling:
    """What a drafter must know of a sampled request."""

    #: Divisor of the logits, above 0.
    temperature: float
    #: Key of the noise, in [0, 2^64).
    seed: int
    #: Absolute position of the anchor; a token at depth d has position ``anchor_position + d``.
    anchor_position: int


def candidate_tables(
    logits: torch.Tensor,
    *,
    width: int,
    anchor_ids: Sequence[int],
    sampling: Sequence[DraftSampling | None],
    sidecar: Correction | None = None,
    sharpness: float = 1.0,
) -> list[CandidateTable]:
    """One table per request, on the CPU.

    Greedy requests get the `width` most probable tokens of each depth with their log-probabilities. Sampled ones get,
    among the `POOL_SIZE` most probable, the `width` best by noised score; a softmax over the pool makes the scores
    probabilities. With a side-car the score of a candidate at depth 2 or deeper depends on the candidate above it: its
    logit is corrected (before temperature and noise) and the row normalised again over the candidates and the remaining
    mass.

    Args:
        logits: ``[R, D, V]`` of the head; row d - 1 is depth d.
        width: candidates per depth; at most V (or the pool) are there.
        anchor_ids: last committed token of each request. Depth 1 is the head's own, so they correct nothing.
        sampling: per request; None is greedy.
        sidecar: pairwise correction of the logits.
        sharpness: factor of greedy requests' logits at depths 2 and deeper.

    Raises:
        ValueError: when the arguments do not fit each other.
    """
    _check(logits, width, anchor_ids, sampling)
    width = min(width, POOL_SIZE, logits.shape[2])
    if all(s is None for s in sampling):
        factors = (sidecar.parent, sidecar.child) if sidecar is not None and logits.shape[1] > 1 else None
        made = draft_candidates(logits, width=width, sharpness=sharpness, factors=factors)
        if made is not None:
            return [CandidateTable(ids=i, scores=s) for i, s in zip(made[0].unbind(0), made[1].unbind(0), strict=True)]
    divisors = _divisors(sampling, logits.device)
    logprobs = _sharpened(logits, sampling, sharpness).log_softmax(-1)
    ids, scores = _marginal(logprobs, width, sampling, divisors)
    if sidecar is not None and logits.shape[1] > 1:
        scores = conditional_scores(ids, scores, sidecar, divisors)
    else:
        scores = scores.unsqueeze(2)
    fixed = to_fixed_point(scores).cpu()
    return [CandidateTable(ids=i, scores=s) for i, s in zip(ids.cpu().unbind(0), fixed.unbind(0), strict=True)]


def _check(
    logits: torch.Tensor,
    width: int,
    anchor_ids: Sequence[int],
    sampling: Sequence[DraftSampling | None],
) -> None:
    num_requests = logits.shape[0]
    if width < 1:
        raise ValueError(f"width = {width}: must be at least 1")
    for name, num in (("anchor_ids", len(anchor_ids)), ("sampling", len(sampling))):
        if num != num_requests:
            raise ValueError(f"{name} has {num} entries: must have one for each of {num_requests} requests")


def _sharpened(logits: torch.Tensor, sampling: Sequence[DraftSampling | None], sharpness: float) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sharpness == 1.0 or all(s is not None for s in sampling):
        return logits
    factors = [[1.0] + [1.0 if s is not None else sharpness] * (logits.shape[1] - 1) for s in sampling]
    return logits * torch.tensor(factors, dtype=logits.dtype, device=logits.device).unsqueeze(2)


def _divisors(sampling: Sequence[DraftSampling | None], device: torch.device) -> torch.Tensor | None:
    """float64 ``[R, 1, 1]``: what divides a log-probability on its way to a score; None when no request is sampled."""
    if all(s is None for s in sampling):
        return None
    rows = [1.0 if s is None else s.temperature for s in sampling]
    return torch.tensor(rows, dtype=torch.float64, device=device)[:, None, None]


def _marginal(
    logprobs: torch.Tensor,
    width: int,
    sampling: Sequence[DraftSampling | None],
    divisors: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate ids and log-probabilities ``[R, D, W]``, best first, as they are without a side-car."""
    noisy = [s for s in sampling if s is not None]
    if divisors is not None and len(noisy) == len(sampling):
        return _noised(logprobs, width, noisy, divisors)
    top = logprobs.topk(width)
    if divisors is None:
        return top.indices, top.values
    rows = torch.tensor([i for i, s in enumerate(sampling) if s is not None], device=logprobs.device)
    ids, scores = top.indices, top.values.double()
    ids[rows], scores[rows] = _noised(logprobs[rows], width, noisy, divisors[rows])
    return ids, scores


def _noised(
    logprobs: torch.Tensor,
    width: int,
    sampling: Sequence[DraftSampling],
    divisors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_marginal` of sampled requests: ranked and weighed with their noise."""
    device = logprobs.device
    pool = logprobs.topk(min(POOL_SIZE, logprobs.shape[2]))
    keys = torch.tensor([(as_signed(s.seed), s.anchor_position) for s in sampling], device=device)
    depths = torch.arange(1, logprobs.shape[1] + 1, device=device).unsqueeze(1)
    noise = gumbel_noise(keys[:, 0, None, None], keys[:, 1, None, None] + depths, pool.indices)
    top = (noise + pool.values / divisors).log_softmax(-1).topk(width)
    return pool.indices.gather(-1, top.indices), top.values


def conditional_scores(
    ids: torch.Tensor, scores: torch.Tensor, sidecar: Correction, divisors: torch.Tensor | None
) -> torch.Tensor:
    """Log-probabilities ``[R, D, W, W]`` of each candidate under each candidate of the depth above.

    Tokens that are no candidates keep their weight uncorrected.
    """
    delta = sidecar.parent[ids[:, :-1]] @ sidecar.child[ids[:, 1:]].transpose(-1, -2)
    if divisors is not None:
        delta = delta / divisors.unsqueeze(3)
    deeper = scores[:, 1:]
    rest = (1.0 - deeper.exp().sum(-1, keepdim=True)).clamp_min_(_LEAST_REST).log_()
    joint = torch.cat((deeper.unsqueeze(2) + delta, rest.unsqueeze(2).expand(-1, -1, delta.shape[2], -1)), -1)
    joint = joint.log_softmax(-1)[..., :-1]
    first = scores[:, :1].unsqueeze(2).expand(-1, -1, scores.shape[2], -1)
    return torch.cat((first, joint), 1)
