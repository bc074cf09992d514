"""The edges: shortest and longest prompts, trees without room, pools too small, nothing to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.types import FinishReason, InvalidRequestError
from support.small_models import EOS_ID, VOCAB_SIZE

FORCE = SpeculationOptions(mode="force", max_tree_nodes=32)
OFF = SpeculationOptions(mode="off")


def _params(**given: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 20, "ignore_eos": True} | given))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llm(tiny_target: str, tiny_head: str) -> LLM:
    return LLM(tiny_target, tiny_head, dtype="float64", num_pages=64, page_size=8, tree_nodes={1: 16})


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65, 240, 254, 255])
def test_prompt_lengths_up_to_the_context_limit(llm: LLM, length: int) -> None:
    prompt = [(5 * i + 2) % VOCAB_SIZE for i in range(length)]
    (plain,) = llm.generate(prompt, _params(speculation=OFF))
    (tree,) = llm.generate(prompt, _params(speculation=FORCE))
    assert tree.token_ids == plain.token_ids
    assert len(tree.token_ids) == min(20, 256 - length)
    assert tree.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5])
def test_tree_is_cut_to_the_tokens_left(llm: LLM, max_tokens: int) -> None:
    (output,) = llm.generate([1, 2, 3], _params(max_tokens=max_tokens, speculation=FORCE))
    assert len(output.token_ids) == max_tokens


def test_all_requests_end_in_one_step(llm: LLM) -> None:
    outputs = llm.generate([[1, 2], [3, 4], [5, 6]], _params(max_tokens=1))
    assert [len(o.token_ids) for o in outputs] == [1, 1, 1]
    assert llm.stats().num_used_pages == 0


def test_empty_step_does_nothing(llm: LLM) -> None:
    before = llm.stats()
    assert llm.engine.step() == []
    assert llm.stats() == before


def test_stop_inside_the_accepted_path(llm: LLM) -> None:
    (whole,) = llm.generate([9, 8, 7], _params(speculation=OFF))
    stop = whole.token_ids[6]
    first = whole.token_ids.index(stop)
    (cut,) = llm.generate([9, 8, 7], _params(speculation=FORCE, stop_token_ids=[stop]))
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert (cut.finish_reason, cut.matched_stop) == (FinishReason.STOP, stop)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], {}, "prompt"),
        ("", {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 256, {}, "prompt"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": [10**6]}, "stop_token_ids"),
        ([1] * 250, {"prior_output_token_ids": [1] * 7}, "prompt"),
        ([1], {"prior_output_token_ids": [1, 5, 1], "stop_token_ids": [5]}, "prior_output_token_ids"),
    ],
    ids=[
        "no-ids",
        "no-text",
        "id-too-large",
        "id-negative",
        "too-long",
        "bias-id",
        "stop-id",
        "too-long-with-prior",
        "prior-behind-stop",
    ],
)
def test_refusals_name_field_value_limit(llm: LLM, prompt: object, params: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate([prompt], _params(**params))  # type: ignore[list-item]
    assert caught.value.field == field
    assert caught.value.limit


def test_half_a_character_is_refused(tiny_target_dir: Path) -> None:
    llm = LLM(str(tiny_target_dir), dtype="float64", num_pages=8)
    with pytest.raises(InvalidRequestError, match="character 2 is a lone surrogate"):
        llm.generate(["ab\ud83d"], _params())


def test_force_without_a_head_is_refused(tiny_target: str) -> None:
    llm = LLM(tiny_target, dtype="float32", num_pages=8)
    with pytest.raises(InvalidRequestError, match="no draft head"):
        llm.generate([1], _params(speculation=FORCE))


def test_pool_too_small_for_one_request(tiny_target: str) -> None:
    llm = LLM(tiny_target, dtype="float32", num_pages=3, page_size=8)
    with pytest.raises(InvalidRequestError, match="do not fit 3 pages of 8 slots"):
        llm.generate([1] * 10, _params(max_tokens=20))
    (output,) = llm.generate([1] * 10, _params(max_tokens=14))
    assert len(output.token_ids) == 14


def test_pool_of_exactly_one_request_still_speculates_or_not_but_ends(tiny_target: str, tiny_head: str) -> None:
    llm = LLM(tiny_target, tiny_head, dtype="float64", num_pages=4, page_size=8, tree_nodes={1: 16})
    outputs = llm.generate([[1] * 12, [2] * 12, [3] * 12], _params(speculation=FORCE))
    assert [len(o.token_ids) for o in outputs] == [20, 20, 20]


def test_end_of_text_is_part_of_the_output(llm: LLM) -> None:
    bias = {EOS_ID: 100.0}
    (output,) = llm.generate([4, 5], _params(ignore_eos=False, logit_bias=bias))
    assert output.token_ids == [EOS_ID]
    assert (output.text, output.finish_reason) == ("", FinishReason.STOP)
    (later,) = llm.generate([4, 5], _params(ignore_eos=False, logit_bias=bias, min_tokens=6, speculation=FORCE))
    assert later.token_ids.index(EOS_ID) == 6


@pytest.mark.parametrize("num_pages", [17, 24, 60])
def test_warm_up_ends_where_the_pool_holds_few_requests(tiny_target: str, tiny_head: str, num_pages: int) -> None:
    small = LLM(tiny_target, tiny_head, dtype="float64", num_pages=num_pages, page_size=16)
    (output,) = small.generate([1, 2, 3], _params(max_tokens=4))
    assert output.usage.completion_tokens == 4


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("mode", ["off", "force"])
def test_chunks_of_one_row_are_of_the_prompt(tiny_target: str, tiny_head: str, chunk: int, mode: str) -> None:
    """A chunk of a single row that is not the prompt's last is no tree."""
    prompts = [[3 * i + j for j in range(length)] for i, length in enumerate((1, 2, 3, 6, 11))]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, speculation=SpeculationOptions(mode=mode))
    options = {"dtype": "float64", "num_pages": 64, "page_size": 8, "tree_nodes": {1: 4}, "enable_prefix_cache": False}
    found, whole = (
        LLM(tiny_target, tiny_head, max_prompt_chunk=rows, **options).generate(prompts, params)
        for rows in (chunk, None)
    )
    assert [output.token_ids for output in found] == [output.token_ids for output in whole]
