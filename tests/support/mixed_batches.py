"""Requests of which prompt chunks, single tokens and trees share steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.types import RequestOutput
from support.small_models import VOCAB_SIZE

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_k": 40},
    "all": {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
}


def make_requests(
    count: int, *, max_tokens: int, speculates: bool = True, kinds: tuple[str, ...] = tuple(SAMPLING)
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of odd lengths, and parameters that take turns."""
    rng = random.Random(count)
    prompts = [[rng.randrange(VOCAB_SIZE - 32) for _ in range(rng.choice([1, 17, 33, 60]))] for _ in range(count)]
    options = SpeculationOptions(mode="force" if speculates else "off")
    params = [
        SamplingParams(
            max_tokens=max_tokens + i % 3, seed=50 + i, speculation=options, **SAMPLING[kinds[i % len(kinds)]]
        )
        for i in range(count)
    ]
    return prompts, params


def run_mixed(
    target: Path, head: Path | None, prompts: list[list[int]], params: list[SamplingParams], **options: Any
) -> list[RequestOutput]:
    """Outputs of one engine; the requests come in one after the other while it steps. Nothing may be left behind."""
    llm = LLM(
        target, head, max_prompt_chunk=20, max_num_requests=8, tree_nodes={8: 12}, **{"num_pages": 96, **options}
    )  # fmt: skip
    requests = [llm.frontend.make_request(f"r{i}", p, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
    waiting = list(requests)
    while waiting or llm.engine.has_work:
        for request in waiting[:1]:
            llm.engine.add(request)
        del waiting[:1]
        llm.engine.step()
    stats = llm.stats()
    assert stats.num_used_pages == 0
    assert stats.num_late_compilations == 0
    outputs = [request.output() for request in requests]
    for output in outputs:
        assert output.finish_reason is not None and str(output.finish_reason) != "error", output.request_id
    return outputs
