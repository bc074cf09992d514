"""A request that goes on from any of its own tokens gives the same rest: tokens, text, reason, counts."""

from __future__ import annotations

import dataclasses

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stop", [(), ("b",)], ids=["no-stop", "stop-string"])
def test_resume_at_every_offset(fp64_target: str, fp64_head: str, temperature: float, stop: tuple[str, ...]) -> None:
    llm = LLM(fp64_target, fp64_head, dtype="float64", num_pages=64, tree_nodes={1: 16})
    params = SamplingParams(
        max_tokens=24,
        min_tokens=3,
        temperature=temperature,
        seed=77,
        stop=stop,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        logprobs=2,
        speculation=SpeculationOptions(mode="force", max_tree_nodes=16),
    )
    (whole,) = llm.generate(PROMPT, params)
    assert whole.logprobs is not None
    for offset in range(1, len(whole.token_ids) + 1):
        prior = whole.token_ids[:offset]
        resumed = dataclasses.replace(params, prior_output_token_ids=prior)
        deltas = list(llm.stream(PROMPT, resumed))
        assert deltas[0].offset == offset
        assert prior + [t for d in deltas for t in d.token_ids] == whole.token_ids
        (output,) = llm.generate(PROMPT, resumed)
        assert (output.text, output.finish_reason, output.usage.completion_tokens) == (
            whole.text,
            whole.finish_reason,
            whole.usage.completion_tokens,
        )
        assert output.logprobs is not None
        for ours, theirs in zip(output.logprobs, whole.logprobs[offset:], strict=True):
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)


def test_resume_at_the_context_limit_is_at_its_end(fp64_target: str) -> None:
    llm = LLM(fp64_target, dtype="float64", num_pages=64, max_model_len=40)
    params = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0.0)
    (whole,) = llm.generate(PROMPT, params)
    (again,) = llm.generate(PROMPT, dataclasses.replace(params, prior_output_token_ids=whole.token_ids))
    assert len(whole.prompt_token_ids) + len(whole.token_ids) == 40
    assert (again.token_ids, again.text, again.finish_reason) == (whole.token_ids, whole.text, whole.finish_reason)
    assert again.usage.completion_tokens == whole.usage.completion_tokens
