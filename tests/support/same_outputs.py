"""Outputs of the embedded model with and without trees, in a batch and alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jetflow_cluster
from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.types import RequestOutput

DEFAULT = Path(jetflow_cluster.__file__).parent / "checkpoints" / "default"


def held_out_prompts(count: int) -> list[list[int]]:
    """Token ids of prompts from files that the embedded models never saw."""
    return [entry["token_ids"] for entry in json.loads((DEFAULT / "held_out_prompts.json").read_text())[:count]]


def generate(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, mode: str, max_tokens: int
) -> list[RequestOutput]:
    """All prompts at once in one mode, each with a seed of its own."""
    nodes = {"off": None, "auto": None, "force": 32}[mode]
    options = SpeculationOptions(mode=mode, max_tree_nodes=nodes)
    several = [
        SamplingParams(temperature=params.temperature, max_tokens=max_tokens, seed=i, speculation=options)
        for i in range(len(prompts))
    ]
    return llm.generate(list(prompts), several)


def check_same_outputs(
    dtype: str, params: SamplingParams, prompts: Sequence[list[int]], *, max_tokens: int
) -> list[RequestOutput]:
    """Without trees in a batch, with trees in a batch, with trees alone: the same tokens. Returns the first."""
    llm = LLM(dtype=dtype, num_pages=1024, max_num_requests=32, tree_nodes={1: 32, 8: 16, 32: 8})
    plain = generate(llm, prompts, params, "off", max_tokens)
    together = generate(llm, prompts, params, "force", max_tokens)
    auto = generate(llm, prompts, params, "auto", max_tokens)
    options = SpeculationOptions(mode="auto")
    alone = [
        llm.generate(
            [prompt],
            SamplingParams(temperature=params.temperature, max_tokens=max_tokens, seed=i, speculation=options),
        )[0]
        for i, prompt in enumerate(prompts)
    ]
    differing = [
        i
        for i, outputs in enumerate(zip(plain, together, auto, alone, strict=True))
        if len({tuple(output.token_ids) for output in outputs}) > 1
    ]
    assert differing == [], f"{len(differing)} of {len(prompts)} prompts"
    assert sum(output.speculation.num_accepted_tokens for output in together) > 0
    return plain
