"""What a request's options do to its logits before the temperature: penalties, bias, suppression.

They touch few tokens of a row, so these are gathered, changed and scattered for all rows at once. All functions work
in place on contiguous float64 scores ``[M, V]``, one row per entry of `rows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from jetflow_cluster.layers.sampling_row import SamplingRow, has_penalties


def apply_penalties(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition penalty on tokens of prompt and output, presence and frequency penalties on those of the output."""
    penalised = [i for i, row in enumerate(rows) if has_penalties(row.params)]
    if not penalised:
        return
    committed = _committed_entries(scores, rows, penalised)
    on_paths = _path_entries(scores, rows, penalised)
    flat = scores.view(-1)
    # Both parts read unpenalised scores; the paths' part is written last, as its counts include the committed ones.
    changed = [(places, _penalised(flat[places], counts, factors)) for places, counts, factors in (committed, on_paths)]
    for places, values in changed:
        flat[places] = values


def apply_logit_bias(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Adds each row's biases. Raises ValueError for a token outside the vocabulary."""
    vocab_size = scores.shape[1]
    places: list[int] = []
    biases: list[float] = []
    for i, row in enumerate(rows):
        for token, bias in row.params.logit_bias.items():
            if token >= vocab_size:
                raise ValueError(f"logit_bias names token {token}: the vocabulary has {vocab_size}")
            places.append(i * vocab_size + token)
            biases.append(bias)
    if places:
        added = torch.tensor(biases, dtype=scores.dtype, device=scores.device)
        scores.view(-1).index_add_(0, torch.tensor(places, device=scores.device), added)


def apply_suppression(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Makes suppressed tokens impossible; those outside the vocabulary are so already."""
    vocab_size = scores.shape[1]
    places = [
        i * vocab_size + token for i, row in enumerate(rows) for token in row.suppressed_ids if token < vocab_size
    ]
    if places:
        scores.view(-1).index_fill_(0, torch.tensor(places, device=scores.device), -math.inf)


#: Flat places int64 ``[n]``, occurrences in the output float64 ``[n]``, and repetition, presence and frequency
#: penalties float64 ``[n, 3]``.
_Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _committed_entries(scores: torch.Tensor, rows: Sequence[SamplingRow], penalised: Sequence[int]) -> _Entries:
    """One entry per penalised row and distinct committed token."""
    parts = [rows[i].counts.tensors(scores.device) for i in penalised]
    places = torch.cat([ids + i * scores.shape[1] for i, (ids, _) in zip(penalised, parts, strict=True)])
    lengths = torch.tensor([len(ids) for ids, _ in parts], device=scores.device)
    factors = _factors(rows, penalised, scores).repeat_interleave(lengths, 0, output_size=len(places))
    return places, torch.cat([counts for _, counts in parts]), factors


def _path_entries(scores: torch.Tensor, rows: Sequence[SamplingRow], penalised: Sequence[int]) -> _Entries:
    """One entry per penalised row and distinct token of its path."""
    places: list[int] = []
    counts: list[int] = []
    owners: list[int] = []
    for i in penalised:
        row = rows[i]
        for token in set(row.path):
            places.append(i * scores.shape[1] + token)
            counts.append(row.counts.num_in_output(token) + list(row.path).count(token))
            owners.append(i)
    return (
        torch.tensor(places, dtype=torch.int64, device=scores.device),
        torch.tensor(counts, dtype=scores.dtype, device=scores.device),
        _factors(rows, owners, scores),
    )


def _factors(rows: Sequence[SamplingRow], indices: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
    factors = [
        (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        for params in (rows[i].params for i in indices)
    ]
    return torch.tensor(factors, dtype=scores.dtype, device=scores.device).view(-1, 3)


def _penalised(values: torch.Tensor, counts: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    repetition, presence, frequency = factors.unbind(1)
    values = torch.where(values > 0, values / repetition, values * repetition)
    return values - (presence * (counts > 0) + frequency * counts)
