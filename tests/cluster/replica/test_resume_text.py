"""Text over a seam: what a broken stream told, and what the resumed one tells, is the text of an unbroken run.

Which characters are certain behind a token is a function of the prompt and the tokens up to it, not of steps. A
resumed request replays its prior tokens, tells nothing of their text that was told before, and holds back what was
held back: no count of delivered text has to travel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jetflow_cluster import LLM, SamplingParams, SpeculationOptions
from jetflow_cluster.engine.detokenizer import IncrementalDetokenizer
from jetflow_cluster.types import RequestDelta
from support.small_models import EOS_ID, write_tokenizer

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119]
TEXT = "naïve 日本 🙂🙃 ab aab end \ufffd"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_certain_text_is_a_function_of_the_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    spelled = tokenizer.encode(TEXT).ids
    ids = data.draw(st.lists(st.sampled_from([*spelled, EOS_ID, 260]), max_size=40)) or spelled
    stop = data.draw(st.lists(st.sampled_from(["ab", "aab", "本 ", "🙃", "end"]), max_size=3))
    minimum = data.draw(st.integers(0, 10))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=4)) | {len(ids)})
    told = [text for text, _ in _told(tokenizer, ids, range(1, len(ids) + 1), stop, minimum)]
    for start in range(len(told)):
        by_cuts = _told(tokenizer, ids, [start, *(cut for cut in cuts if cut > start)], stop, minimum)
        assert [told[end - 1] if end else "" for _, end in by_cuts] == [text for text, _ in by_cuts]


def _told(
    tokenizer: Tokenizer, ids: Sequence[int], ends: Sequence[int], stop: Sequence[str], minimum: int
) -> list[tuple[str, int]]:
    """The text so far behind each of some numbers of tokens, up to a stop string."""
    made = IncrementalDetokenizer(tokenizer, PROMPT, stop)
    text, start, found = "", 0, []
    for end in ends:
        pushed = made.push(ids[start:end], num_below_minimum=max(0, minimum - start))
        text += pushed.text
        if pushed.stop_index is not None:
            return [*found, (text, start + pushed.stop_index + 1)]
        found.append((text, end))
        start = end
    return found


def _parts(deltas: Sequence[RequestDelta]) -> tuple[list[int], str]:
    return [token for delta in deltas for token in delta.token_ids], "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stop", [(), ("never", "e"), "cut"], ids=["no-stop", "single", "across-tokens"])
def test_resumed_at_every_step(fp64_target: Path, fp64_head: Path, temperature: float, stop: str | tuple[str]) -> None:
    llm = LLM(str(fp64_target), str(fp64_head), dtype="float64", num_pages=64, page_size=8, tree_nodes={1: 12})
    params = SamplingParams(
        max_tokens=24,
        min_tokens=3,
        temperature=temperature,
        seed=7,
        logprobs=1,
        presence_penalty=0.4,
        speculation=SpeculationOptions(mode="force", max_tree_nodes=12),
    )
    if stop == "cut":
        # A string from the middle of the text, over two tokens.
        text = _parts(list(llm.stream(PROMPT, params)))[1]
        stop = next(text[i : i + 2] for i in range(5, len(text) - 2) if "\ufffd" not in text[i : i + 2])
    params = dataclasses.replace(params, stop=stop)
    deltas = list(llm.stream(PROMPT, params))
    whole = _parts(deltas)
    for first in range(1, len(deltas)):
        before, text = _parts(deltas[:first])
        resumed = list(llm.stream(PROMPT, dataclasses.replace(params, prior_output_token_ids=before)))
        assert resumed[0].offset == len(before)
        assert (before + _parts(resumed)[0], text + _parts(resumed)[1]) == whole
        assert resumed[-1].finish_reason is deltas[-1].finish_reason
        # Lost once more, behind the first step of the resumed run.
        again, told = before + resumed[0].token_ids, text + resumed[0].text
        if len(resumed) > 1:
            last = list(llm.stream(PROMPT, dataclasses.replace(params, prior_output_token_ids=again)))
            assert (again + _parts(last)[0], told + _parts(last)[1]) == whole
