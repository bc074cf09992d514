"""What goes in and out of `accept_tree`: tensors of fixed sizes, overwritten in place by each call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

#: Tokens of the vocabulary that one program takes.
CHUNK = 1024
#: Columns of `SamplingTable.numbers` and `SamplingTable.factors`.
NUMBER_COLUMNS = ("seed", "position", "top_k", "num_barred", "num_changed")
FACTOR_COLUMNS = ("temperature", "top_p", "log_min_p", "repetition", "presence", "frequency")


@dataclass(frozen=True, kw_only=True)
class VerifiedTrees:
    """R trees beside the logits of their rows."""

    #: int32 ``[R, N]``; entry 0 is not read.
    token_ids: torch.Tensor
    #: int32 ``[R, N]``.
    parents: torch.Tensor
    #: Nodes of each tree, int32 ``[R]``; 0: there is no such request, and nothing is chosen.
    counts: torch.Tensor
    #: Row of `logits` of each root, int32 ``[R]`` or longer; node i has the i-th row from there.
    first_rows: torch.Tensor
    #: ``[M, V]`` in fp64, fp32, bf16 or fp16; rows may be strided. NaN counts as infinite.
    logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingTable:
    """What R requests ask of their tokens. The tensors' values may change between calls; the two marks may not, where
    calls are recorded in a graph."""

    #: int64 ``[R, 5]``, in the order of `NUMBER_COLUMNS`: key of the noise (two's complement); absolute position of the
    #: first token that is chosen; tokens that top-k keeps, 0 for all; how many of the next tokens may not be one of
    #: `barred_ids`; entries of the changed tokens.
    numbers: torch.Tensor
    #: float64 ``[R, 6]``, in the order of `FACTOR_COLUMNS`. Temperature 0 is greedy; a top-p of 1, the logarithm of a
    #: min-p of 0 (-inf), a repetition penalty of 1 and other penalties of 0 do nothing.
    factors: torch.Tensor
    #: Distinct tokens that have a count or a bias, int32 ``[R, C]``.
    changed_ids: torch.Tensor
    #: Occurrences of each in the output so far; 0: in the prompt alone; -1: in neither. int32 ``[R, C]``.
    changed_counts: torch.Tensor
    #: Added to the logit of each, float64 ``[R, C]``.
    changed_bias: torch.Tensor
    #: Tokens that end the output, int32 ``[R, S]``, padded with -1.
    barred_ids: torch.Tensor
    #: Some request may have penalties, biases or barred tokens.
    has_changes: bool
    #: Some request may have top-k, top-p or min-p.
    has_filters: bool

    @property
    def is_processed(self) -> bool:
        """Scores are written out before a token is drawn."""
        return self.has_changes or self.has_filters

    @classmethod
    def allocate(
        cls,
        *,
        num_requests: int,
        num_changed: int,
        num_barred: int,
        has_changes: bool,
        has_filters: bool,
        device: torch.device,
    ) -> SamplingTable:
        """Greedy requests, with room for so many changed and barred tokens each."""
        factors = torch.tensor([0.0, 1.0, float("-inf"), 1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        changed = (num_requests, max(1, num_changed))
        return cls(
            numbers=torch.zeros(num_requests, len(NUMBER_COLUMNS), dtype=torch.int64, device=device),
            factors=factors.repeat(num_requests, 1),
            changed_ids=torch.zeros(changed, dtype=torch.int32, device=device),
            changed_counts=torch.full(changed, -1, dtype=torch.int32, device=device),
            changed_bias=torch.zeros(changed, dtype=torch.float64, device=device),
            barred_ids=torch.full((num_requests, max(1, num_barred)), -1, dtype=torch.int32, device=device),
            has_changes=has_changes,
            has_filters=has_filters,
        )

    def to(self, device: torch.device) -> SamplingTable:
        """The same on another device."""
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True)
class WalkBuffers:
    """The paths of R requests, then what walking needs in between. What lies behind a path is undefined."""

    #: Accepted nodes, the root first, int32 ``[R, L]``.
    nodes: torch.Tensor
    #: Tokens of the accepted nodes behind the root, then the bonus token: one per accepted node, int32 ``[R, L]``.
    token_ids: torch.Tensor
    #: Accepted nodes, the root counted, int32 ``[R]``; 0 for requests that are not there.
    lengths: torch.Tensor
    #: Requests whose walk goes on, int32 ``[R]``; all 0 at the end.
    walking: torch.Tensor
    #: Best score of each chunk of the vocabulary, float64 ``[rows, chunks]``, and its token, int32.
    best_scores: torch.Tensor
    best_ids: torch.Tensor
    #: Scores of the row that each walk has reached, float64 ``[R, V]``, and room to choose from them.
    scores: torch.Tensor
    shortlist: torch.Tensor
    #: Least score that each row keeps, float64 ``[R]``, and the last token of that score, int32 ``[R]``.
    cut: torch.Tensor
    cut_id: torch.Tensor

    @classmethod
    def allocate(
        cls,
        *,
        num_requests: int,
        num_levels: int,
        num_rows: int,
        vocab_size: int,
        is_processed: bool,
        device: torch.device,
    ) -> WalkBuffers:
        """Room for paths of `num_levels` nodes, the depth of the deepest tree plus 1, over logits of `num_rows` rows;
        `is_processed`: also for tables that are so."""
        num_chunks = -(-vocab_size // CHUNK)
        scored = (num_requests, vocab_size) if is_processed else (num_requests, 0)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            nodes=zeros(num_requests, num_levels),
            token_ids=zeros(num_requests, num_levels),
            lengths=zeros(num_requests),
            walking=zeros(num_requests),
            best_scores=zeros(max(num_rows, num_requests), num_chunks, dtype=torch.float64),
            best_ids=zeros(max(num_rows, num_requests), num_chunks),
            scores=zeros(*scored, dtype=torch.float64),
            shortlist=zeros(*scored, dtype=torch.float64),
            cut=zeros(num_requests, dtype=torch.float64),
            cut_id=zeros(num_requests),
        )
