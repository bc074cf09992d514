"""What the sampler must know of one row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jetflow_cluster.layers.token_counts import TokenCounts
from jetflow_cluster.types import SamplingParams


@dataclass(kw_only=True)
class SamplingRow:
    """The request behind one row of logits, at the node that the row belongs to."""

    #: Options of the request.
    params: SamplingParams
    #: Key of its noise, in [0, 2^64).
    seed: int
    #: Absolute position of the token to choose.
    position: int
    #: Occurrences of the committed tokens.
    counts: TokenCounts
    #: Tokens between the committed ones and this row, which count as output.
    path: Sequence[int] = ()
    #: Tokens that must not be chosen here (those that end the output, below `min_tokens`).
    suppressed_ids: Sequence[int] = ()


def has_penalties(params: SamplingParams) -> bool:
    """True when the tokens so far change the logits."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def is_plain_greedy(params: SamplingParams) -> bool:
    """True when the token is the argmax of the raw logits, unless tokens are suppressed."""
    return params.is_greedy and not params.logit_bias and not has_penalties(params)
