"""Output equals `transformers`, one token at a time, whatever the engine does: small models in fp64, no exception.

The cases cover every pair of values of the factors below. A sixth of them runs by default; ``-m lossless`` runs
the others.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
from allpairspy import AllPairs

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.request import Request
from jetflow_cluster.types import RequestOutput
from support.adversaries import Adversary, NoDrafter
from support.oracle import Oracle
from support.small_models import EOS_ID, VOCAB_SIZE

FACTORS: dict[str, list[Any]] = {
    "batch": [1, 3, 8, 32],
    "nodes": [1, 2, 16, 64, 128],
    "chunk": [16, 100, 512],
    "prompt": [1, 5, 63, 64, 65, 400],
    "arrival": ["together", "staggered"],
    "prefix": ["none", "hit"],
    "memory": ["ample", "preempts"],
    "drafter": ["empty", "right", "wrong", "random", "repeated", "head", "head_alone"],
    "sampling": [
        "greedy",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition",
        "presence",
        "frequency",
        "bias",
        "min_tokens",
        "stop_ids",
        "greedy_penalties",
        "all",
    ],
    "page_size": [16, 7],
    "mode": ["auto", "force"],
}

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 1.3, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "repetition": {"temperature": 0.7, "repetition_penalty": 1.5},
    "presence": {"temperature": 1.0, "presence_penalty": 1.5},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.9},
    "bias": {"temperature": 1.0, "logit_bias": {3: 4.0, 17: -100.0, 40: 2.5}},
    "min_tokens": {"temperature": 1.0, "min_tokens": 9, "logit_bias": {EOS_ID: 6.0}},
    "stop_ids": {"temperature": 1.0, "stop_token_ids": [5, 60, 61, 62, 99, 130]},
    "greedy_penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "all": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "logit_bias": {3: 2.0, EOS_ID: 3.0},
        "min_tokens": 5,
        "stop_token_ids": [11, 12],
    },
}


@dataclass(frozen=True)
class Case:
    """One combination."""

    batch: int
    nodes: int
    chunk: int
    prompt: int
    arrival: str
    prefix: str
    memory: str
    drafter: str
    sampling: str
    page_size: int
    mode: str

    def __str__(self) -> str:
        return "-".join(str(getattr(self, name)) for name in FACTORS)


CASES = [Case(*values) for values in AllPairs(list(FACTORS.values()))]


def _prompts(case: Case) -> list[list[int]]:
    rng = random.Random(str(case))
    shared = [rng.randrange(VOCAB_SIZE - 32) for _ in range(case.prompt)]
    prompts = []
    for i in range(case.batch):
        own = [rng.randrange(VOCAB_SIZE - 32) for _ in range(case.prompt)]
        if case.prefix == "hit":
            cut = max(1, case.prompt - 1 - i % 5)
            own = shared[:cut] + own[cut:]
        prompts.append(own)
    return prompts


def _params(case: Case, index: int) -> SamplingParams:
    limit = None if case.nodes > 100 else case.nodes
    options = SpeculationOptions(mode=case.mode, max_tree_nodes=limit)
    # Long enough to cross pages and to finish at different steps.
    return SamplingParams(max_tokens=12 + index % 4, seed=1000 + index, speculation=options, **SAMPLING[case.sampling])


def run_case(case: Case, target_dir: str, head_dir: str, oracle: Oracle) -> tuple[list[RequestOutput], list[Any]]:
    """Outputs of the engine, and ``(token_ids, finish_reason)`` of the oracle."""
    prompts = _prompts(case)
    params = [_params(case, i) for i in range(case.batch)]
    expected = [oracle.complete(p, s) for p, s in zip(prompts, params, strict=True)]
    known = {(tuple(p), s.seed): tokens for p, s, (tokens, _) in zip(prompts, params, expected, strict=True)}

    def truth(request: Request) -> list[int]:
        return known.get((tuple(request.prompt_token_ids), request.seed), [])[request.num_output :]

    longest = max(len(p) + s.max_tokens for p, s in zip(prompts, params, strict=True))
    per_request = -(-longest // case.page_size)
    num_pages = 4 * case.batch * per_request + 256
    if case.memory == "preempts":
        num_pages = per_request * max(1, case.batch // 2) + 1
    by_head = case.drafter in ("head", "head_alone")
    llm = LLM(
        target_dir,
        head_dir if by_head else None,
        dtype="float64",
        page_size=case.page_size,
        num_pages=num_pages,
        max_prompt_chunk=case.chunk,
        max_num_requests=32,
        tree_nodes={32: case.nodes},
        context_lookup=case.drafter == "head",
        drafter_factory=None if by_head else lambda *_: NoDrafter(),
        tree_builder=None if by_head else Adversary(case.drafter, truth, VOCAB_SIZE),
    )
    outputs = _run(llm, prompts, params, case)
    stats = llm.stats()
    assert stats.num_used_pages == 0
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages
    return outputs, expected


def _run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], case: Case) -> list[RequestOutput]:
    if case.prefix == "hit":
        warm = SamplingParams(max_tokens=1, temperature=0.0)
        llm.generate([prompts[0]], warm)
    if case.arrival == "together":
        return llm.generate(prompts, params)
    frontend, engine = llm.frontend, llm.engine
    requests = [frontend.make_request(f"r{i}", p, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
    waiting = list(requests)
    while waiting or engine.has_work:
        for request in waiting[:2]:
            engine.add(request)
        del waiting[:2]
        engine.step()
    return [request.output() for request in requests]


_SHUFFLED = random.Random(0).sample(CASES, len(CASES))
_NUM_QUICK = len(CASES) // 6


@pytest.mark.parametrize("case", _SHUFFLED[:_NUM_QUICK], ids=str)
def test_identity_subset(case: Case, fp64_target: str, fp64_head: str, fp64_oracle: Oracle) -> None:
    _check(case, fp64_target, fp64_head, fp64_oracle)


@pytest.mark.lossless
@pytest.mark.parametrize("case", _SHUFFLED[_NUM_QUICK:], ids=str)
def test_identity(case: Case, fp64_target: str, fp64_head: str, fp64_oracle: Oracle) -> None:
    _check(case, fp64_target, fp64_head, fp64_oracle)


def _check(case: Case, target_dir: str, head_dir: str, oracle: Oracle) -> None:
    outputs, expected = run_case(case, target_dir, head_dir, oracle)
    for output, (token_ids, reason) in zip(outputs, expected, strict=True):
        assert output.token_ids == token_ids
        assert str(output.finish_reason) == reason
        assert output.usage.completion_tokens == len(token_ids)


def test_cases_cover_every_pair() -> None:
    for first, second in itertools.combinations(FACTORS, 2):
        covered = {(getattr(case, first), getattr(case, second)) for case in CASES}
        assert covered == set(itertools.product(FACTORS[first], FACTORS[second]))
