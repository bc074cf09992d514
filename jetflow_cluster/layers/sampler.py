"""The target's own token at each row of logits: the rule that defines every output of the engine.

``argmax_v(score_v + gumbel(seed, position, v))``; score: the logits behind penalties, bias, suppression, temperature,
top-k, top-p and min-p, in this order. Greedy is the argmax of the logits behind penalties, bias and suppression.
Equal scores go to the lowest token id. A row's token depends on nothing but that row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jetflow_cluster.layers.logits_filters import apply_filters, best_mask
from jetflow_cluster.layers.logits_processing import apply_logit_bias, apply_penalties, apply_suppression
from jetflow_cluster.layers.sampling_row import SamplingRow, is_plain_greedy
from jetflow_cluster.layers.token_counts import TokenCounts
from jetflow_cluster.tree.noise import as_signed, gumbel_noise
from jetflow_cluster.types import TokenLogprobs

__all__ = ["SamplingRow", "TokenCounts", "choose_tokens", "is_plain_greedy", "token_logprobs"]

#: Scores processed at once: on the CPU what stays in its cache, elsewhere what bounds the memory.
_CPU_BLOCK_SIZE, _DEVICE_BLOCK_SIZE = 2**15, 2**24


def choose_tokens(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token per row.

    Args:
        logits: ``[M, V]``, any floating type; left as they are. Everything behind them is float64.
        rows: what each row belongs to. Token ids in them must be below V.

    Raises:
        ValueError: when there is not one row for each row of logits.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{len(rows)} sampling rows for logits of {logits.shape[0]} rows")
    processed = [i for i, row in enumerate(rows) if row.suppressed_ids or not is_plain_greedy(row.params)]
    tokens: list[int] = logits.argmax(-1).tolist() if len(processed) < len(rows) else [0] * len(rows)
    block_size = _CPU_BLOCK_SIZE if logits.device.type == "cpu" else _DEVICE_BLOCK_SIZE
    num_block_rows = max(1, block_size // logits.shape[1])
    for start in range(0, len(processed), num_block_rows):
        block = processed[start : start + num_block_rows]
        scores = logits[torch.tensor(block, device=logits.device)].double()
        for i, token in zip(block, _processed_tokens(scores, [rows[i] for i in block]), strict=True):
            tokens[i] = token
    return tokens


def _processed_tokens(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Tokens of rows whose logits, here as scores float64 ``[M, V]`` to write on, are not taken as they are."""
    apply_penalties(scores, rows)
    apply_logit_bias(scores, rows)
    apply_suppression(scores, rows)
    sampled = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    if len(sampled) == len(rows):
        _apply_sampling(scores, rows)
    elif sampled:
        indices = torch.tensor(sampled, device=scores.device)
        part = scores[indices]
        _apply_sampling(part, [rows[i] for i in sampled])
        scores[indices] = part
    tokens: list[int] = scores.argmax(-1).tolist()
    return tokens


def _apply_sampling(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Temperature, filters and noise of sampled rows, in place; noise is drawn only for tokens that are left."""
    device = scores.device
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=scores.dtype, device=device)
    scores /= temperatures.unsqueeze(1)
    keys = torch.tensor([(as_signed(row.seed), row.position) for row in rows], dtype=torch.int64, device=device)
    seeds, positions = keys[:, :1], keys[:, 1:]
    if apply_filters(scores, [row.params for row in rows]):
        left, token_ids = (scores > -torch.inf).nonzero(as_tuple=True)
        scores[left, token_ids] += gumbel_noise(seeds[left, 0], positions[left, 0], token_ids)
    else:
        scores += gumbel_noise(seeds, positions, torch.arange(scores.shape[1], device=device))


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], top_n: int) -> list[TokenLogprobs]:
    """Log-probabilities of the raw logits, before penalties and filters.

    Args:
        logits: ``[M, V]``; computed in float32, or float64 for float64 logits.
        token_ids: the token of each row.
        top_n: best tokens to name per row, best first, the lower id first where logits are equal; at most V are there.
    """
    if not token_ids:
        return []
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if top_n:
        num_top = min(top_n, logits.shape[1])
        last = logits.topk(num_top).values[:, -1:]
        is_top = best_mask(logits, torch.full_like(last, num_top, dtype=torch.int64), last)
        ids = is_top.nonzero()[:, 1].view(-1, num_top)
        ids = ids.gather(1, logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices)
        pairs = zip(ids.tolist(), logprobs.gather(1, ids).tolist(), strict=True)
        tops = [tuple(zip(row_ids, values, strict=True)) for row_ids, values in pairs]
    return [
        TokenLogprobs(token_id=token, logprob=logprob, top=top)
        for token, logprob, top in zip(token_ids, chosen, tops, strict=True)
    ]
