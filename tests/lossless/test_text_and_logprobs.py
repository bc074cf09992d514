"""Text, stop strings and log-probabilities with trees equal those of plain decoding and of `transformers`."""

from __future__ import annotations

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.types import FinishReason, RequestOutput
from support.oracle import Oracle
from support.small_models import EOS_ID

PROMPTS = [[72, 105, 33], [65] * 40, [100, 101, 102, 32, 120, 40, 41, 58, 10] * 8]


def _run(llm: LLM, mode: str, **given: object) -> list[RequestOutput]:
    options = SpeculationOptions(mode=mode, max_tree_nodes=16 if mode == "force" else None)
    params = SamplingParams(max_tokens=40, seed=5, speculation=options, **given)  # type: ignore[arg-type]
    return llm.generate(PROMPTS, params)


@pytest.fixture(scope="module")
def llm(fp64_target: str, fp64_head: str) -> LLM:
    return LLM(fp64_target, fp64_head, dtype="float64", num_pages=256, tree_nodes={1: 16})


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_stop_strings(llm: LLM, temperature: float) -> None:
    whole = _run(llm, "off", temperature=temperature, ignore_eos=True)
    assert llm.tokenizer is not None
    for output in whole:
        assert output.text == llm.tokenizer.decode(output.token_ids)
    # A stop string taken from the middle of one text, across two tokens.
    text = whole[0].text
    stop = next(
        text[i : i + 2]
        for i in range(10, len(text) - 2)
        if text.find(text[i : i + 2]) == i and "\ufffd" not in text[i : i + 2]
    )
    plain = _run(llm, "off", temperature=temperature, ignore_eos=True, stop=[stop, "never there"])
    trees = _run(llm, "force", temperature=temperature, ignore_eos=True, stop=[stop, "never there"])
    assert plain[0].text == text[: text.index(stop)]
    assert (plain[0].finish_reason, plain[0].matched_stop) == (FinishReason.STOP, stop)
    for a, b in zip(plain, trees, strict=True):
        assert (a.text, a.token_ids, a.finish_reason, a.matched_stop) == (
            b.text,
            b.token_ids,
            b.finish_reason,
            b.matched_stop,
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_stream_equals_generate(llm: LLM, temperature: float) -> None:
    options = SpeculationOptions(mode="force", max_tree_nodes=16)
    params = SamplingParams(max_tokens=40, seed=5, temperature=temperature, stop="q", speculation=options, logprobs=1)
    for prompt in PROMPTS:
        (whole,) = llm.generate([prompt], params)
        deltas = list(llm.stream(prompt, params))
        assert "".join(d.text for d in deltas) == whole.text
        assert [t for d in deltas for t in d.token_ids] == whole.token_ids
        assert [d.offset for d in deltas] == [sum(len(e.token_ids) for e in deltas[:i]) for i in range(len(deltas))]
        assert [e.token_id for d in deltas for e in d.logprobs or []] == whole.token_ids
        assert deltas[-1].finish_reason == whole.finish_reason


@pytest.mark.parametrize("mode", ["off", "force"])
def test_logprobs_equal_transformers(llm: LLM, fp64_oracle: Oracle, mode: str) -> None:
    for output in _run(llm, mode, temperature=1.0, logprobs=3, prompt_logprobs=2):
        sequence = output.prompt_token_ids + output.token_ids
        expected = fp64_oracle.all_logprobs(sequence)
        assert output.logprobs is not None
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = [*output.prompt_logprobs[1:], *output.logprobs]
        assert len(entries) == len(sequence) - 1
        for position, entry in enumerate(entries):
            assert entry is not None
            row = expected[position]
            assert entry.token_id == sequence[position + 1]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            count = 2 if position + 1 < len(output.prompt_token_ids) else 3
            best = row.topk(count)
            assert [t for t, _ in entry.top] == best.indices.tolist()
            assert [v for _, v in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_end_of_text_never_shows(llm: LLM) -> None:
    outputs = _run(llm, "force", temperature=0.0, logit_bias={EOS_ID: 3.0})
    assert all("endoftext" not in output.text for output in outputs)
