"""Where two outputs may part: the best two scores in fp64 are closer than lower precision can tell."""

from __future__ import annotations

from collections.abc import Sequence

from jetflow_cluster.bench.near_ties import NEAR_TIE, first_difference
from jetflow_cluster.types import SamplingParams
from support.oracle import Oracle


def assert_same_tokens(
    found: Sequence[list[int]],
    expected: Sequence[list[int]],
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    oracle: Oracle,
) -> list[str]:
    """The near-ties at which outputs part, at most one per 10,000 tokens; any other difference fails.

    Args:
        found: token ids of each output.
        expected: those that should have come.
        prompts: of each output.
        params: of each output.
        oracle: of the same weights, in fp64.
    """
    near_ties = []
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        at = first_difference(ours, theirs)
        if at is not None:
            gap = oracle.gap(prompts[i], list(theirs[:at]), params[i])
            assert gap < NEAR_TIE, f"output {i} parts at token {at}, where the gap is {gap:.1e}: {ours} {theirs}"
            near_ties.append(f"output {i} at token {at}, gap {gap:.1e}")
    num_tokens = sum(map(len, expected))
    assert len(near_ties) <= -(-num_tokens // 10_000), near_ties
    return near_ties
