"""What requests ask of their tokens, as the tensors that the walk on a device reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jetflow_cluster.layers.sampling_row import has_penalties, is_plain_greedy
from jetflow_cluster.layers.token_counts import TokenCounts
from jetflow_cluster.tree.noise import as_signed
from jetflow_cluster.types import SamplingParams
from jetflow_kernels.accept_tree import SamplingTable


@dataclass(frozen=True, kw_only=True)
class WalkSampling:
    """One request at the root of its tree."""

    #: Options of the request.
    params: SamplingParams
    #: Key of its noise, in [0, 2^64).
    seed: int
    #: Absolute position of the first token to choose.
    position: int
    #: Occurrences of the committed tokens; asked only where penalties count them.
    counts: TokenCounts
    #: How many of the next tokens may not be one of `barred_ids`.
    num_barred: int = 0
    #: Tokens that end the output.
    barred_ids: Sequence[int] = ()


def sampling_table(requests: Sequence[WalkSampling], *, vocab_size: int, device: torch.device) -> SamplingTable | None:
    """The table of a batch; None when all requests take the best logit.

    Raises:
        ValueError: a bias for a token outside of the vocabulary.
    """
    if all(is_plain_greedy(r.params) and not (r.num_barred and r.barred_ids) for r in requests):
        return None
    changed = [changed_tokens(r, vocab_size) for r in requests]
    table = SamplingTable.allocate(
        num_requests=len(requests),
        num_changed=max(len(ids) for ids, _, _ in changed),
        num_barred=max(len(r.barred_ids) for r in requests),
        has_changes=any(has_changes(r.params) or r.num_barred for r in requests),
        has_filters=any(has_filters(r.params) for r in requests),
        device=torch.device("cpu"),
    )
    for i, (r, (ids, counts, bias)) in enumerate(zip(requests, changed, strict=True)):
        params = r.params
        numbers = (as_signed(r.seed), r.position, params.top_k, r.num_barred, len(ids))
        table.numbers[i] = torch.tensor(numbers)
        table.factors[i] = torch.tensor(walk_factors(params), dtype=torch.float64)
        table.changed_ids[i, : len(ids)] = ids
        table.changed_counts[i, : len(ids)] = counts
        table.changed_bias[i, : len(ids)] = bias
        table.barred_ids[i, : len(r.barred_ids)] = torch.tensor(r.barred_ids, dtype=torch.int32)
    return table.to(device)


def walk_factors(params: SamplingParams) -> tuple[float, ...]:
    """A row of `SamplingTable.factors`."""
    log_min_p = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return (params.temperature, params.top_p, log_min_p, *penalties)


def has_filters(params: SamplingParams) -> bool:
    """True where some tokens are left out before one is drawn."""
    return not params.is_greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)


def has_changes(params: SamplingParams) -> bool:
    """True where scores of single tokens are changed."""
    return bool(params.logit_bias) or has_penalties(params)


def changed_tokens(request: WalkSampling, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct tokens, their occurrences (-1 for none that counts) and their biases."""
    ids, counts = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    if has_penalties(request.params):
        ids, counts = request.counts.tensors(torch.device("cpu"))
    bias = torch.zeros(len(ids), dtype=torch.float64)
    given = request.params.logit_bias
    if given:
        for token in given:
            if token >= vocab_size:
                raise ValueError(f"logit_bias names token {token}: the vocabulary has {vocab_size}")
        places = {token: i for i, token in enumerate(ids.tolist())}
        known = [token for token in given if token in places]
        new = [token for token in given if token not in places]
        bias[[places[token] for token in known]] = torch.tensor([given[t] for t in known], dtype=torch.float64)
        ids = torch.cat((ids, torch.tensor(new, dtype=torch.int64)))
        counts = torch.cat((counts, torch.full((len(new),), -1.0, dtype=torch.float64)))
        bias = torch.cat((bias, torch.tensor([given[t] for t in new], dtype=torch.float64)))
    return ids.to(torch.int32), counts.to(torch.int32), bias
