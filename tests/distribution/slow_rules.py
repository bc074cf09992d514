"""The rules that define the next token, written out slowly, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from jetflow_cluster.tree.noise import gumbel_noise
from jetflow_cluster.types import SamplingParams


def slow_scores(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    suppressed: Sequence[int],
) -> list[float]:
    """Scores behind all options but the noise; dropped tokens are -inf."""
    scores = [float(logit) for logit in logits]
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(output):
        scores[token] -= params.presence_penalty + params.frequency_penalty * list(output).count(token)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in suppressed:
        scores[token] = -math.inf
    if params.is_greedy:
        return scores
    scores = [score / params.temperature for score in scores]
    kept = _kept(scores, params)
    return [score if token in kept else -math.inf for token, score in enumerate(scores)]


def _kept(scores: list[float], params: SamplingParams) -> set[int]:
    # Ties go to the lower token id.
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    best = scores[order[0]]
    kept = order[: params.top_k or len(order)]
    if params.top_p < 1.0:
        weights = [math.exp(scores[token] - best) for token in kept]
        mass, needed = 0.0, params.top_p * sum(weights)
        nucleus = []
        for token, weight in zip(kept, weights, strict=True):
            if mass < needed:
                nucleus.append(token)
            mass += weight
        kept = nucleus
    if params.min_p > 0.0:
        kept = [token for token in kept if scores[token] >= best + math.log(params.min_p)]
    return set(kept)


def slow_choice(
    logits: Sequence[float],
    params: SamplingParams,
    seed: int,
    position: int,
    prompt: Sequence[int],
    output: Sequence[int],
    suppressed: Sequence[int],
) -> int:
    """The token that the rules choose."""
    scores = slow_scores(logits, params, prompt, output, suppressed)
    if not params.is_greedy:
        noise = gumbel_noise(seed, torch.tensor(position), torch.arange(len(scores))).tolist()
        scores = [score + g for score, g in zip(scores, noise, strict=True)]
    return max(range(len(scores)), key=lambda token: (scores[token], -token))


def slow_probabilities(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    suppressed: Sequence[int],
) -> list[float]:
    """The distribution of the sampled token over all seeds."""
    scores = slow_scores(logits, params, prompt, output, suppressed)
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    return [weight / sum(weights) for weight in weights]
