"""How close the two best tokens were where two outputs part."""

from __future__ import annotations

from collections.abc import Sequence

from jetflow_cluster.engine.local import LLM
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

#: Gap of the best two log-probabilities in fp64 under which lower precision may choose either.
NEAR_TIE = 1e-4


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two outputs differ; None when they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def greedy_gap(model: str | None, prefix: Sequence[int], *, device: str = "auto") -> float:
    """Difference of the two best log-probabilities behind `prefix`, computed in fp64.

    Args:
        model: target checkpoint; None is the embedded default.
        prefix: token ids of prompt and output up to the place of interest.
        device: where to compute.
    """
    llm = LLM(model, dtype="float64", device=device, tree_nodes={1: 1}, max_num_requests=1)
    off = SpeculationOptions(mode=SpeculationMode.OFF)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2, ignore_eos=True, speculation=off)
    logprobs = llm.generate([list(prefix)], params)[0].logprobs
    if not logprobs:
        raise RuntimeError("the engine gave no log-probabilities")
    (_, best), (_, second) = logprobs[0].top[:2]
    return best - second
