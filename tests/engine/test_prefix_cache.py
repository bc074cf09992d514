"""Reuse of prompt prefixes: counted, limited, and never visible in the tokens."""

from __future__ import annotations

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions

PROMPT = [(3 * i) % 250 for i in range(50)]


@pytest.mark.parametrize("mode", ["off", "force"])
@pytest.mark.parametrize(
    ("length", "cached"), [(50, 48), (49, 48), (48, 40), (9, 8), (8, 0)], ids=lambda value: str(value)
)
def test_cached_tokens(tiny_target: str, tiny_head: str, mode: str, length: int, cached: int) -> None:
    llm = LLM(tiny_target, tiny_head, dtype="float64", num_pages=64, page_size=8, tree_nodes={1: 8})
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, speculation=SpeculationOptions(mode=mode))
    (first,) = llm.generate(PROMPT[:length], params)
    (second,) = llm.generate(PROMPT[:length], params)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == cached
    assert second.token_ids == first.token_ids


def test_pages_without_draft_context_are_recomputed_for_speculation(tiny_target: str, tiny_head: str) -> None:
    llm = LLM(tiny_target, tiny_head, dtype="float64", num_pages=64, page_size=8, tree_nodes={1: 8})
    off = SamplingParams(temperature=0.0, max_tokens=4, speculation=SpeculationOptions(mode="off"))
    force = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, speculation=SpeculationOptions(mode="force")
    )
    llm.generate(PROMPT, off)
    (cold,) = llm.generate(PROMPT, force)
    (warm,) = llm.generate(PROMPT, force)
    assert cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens == 48
    # The same draft context gives the same guesses, whether computed or reused.
    assert warm.speculation.accepted_per_step == cold.speculation.accepted_per_step


def test_prompt_logprobs_bypass_the_cache(tiny_target: str) -> None:
    llm = LLM(tiny_target, dtype="float64", num_pages=64, page_size=8)
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    llm.generate(PROMPT, params)
    (second,) = llm.generate(PROMPT, params)
    assert second.usage.cached_tokens == 0
    assert second.prompt_logprobs is not None
    assert len(second.prompt_logprobs) == len(PROMPT)


def test_switched_off(tiny_target: str) -> None:
    llm = LLM(tiny_target, dtype="float64", num_pages=64, page_size=8, enable_prefix_cache=False)
    params = SamplingParams(temperature=0.0, max_tokens=2)
    for _ in range(2):
        (output,) = llm.generate(PROMPT, params)
        assert output.usage.cached_tokens == 0
    assert llm.stats().num_free_pages == 64
