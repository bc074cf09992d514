"""Text comes in whole characters, stops exactly, and does not depend on how tokens are cut into steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jetflow_cluster.engine.detokenizer import IncrementalDetokenizer

TEXTS = [
    "naïve café 🙂🙃 end",
    "e\u0301 combining",
    "日本語のテキスト",
    "def f(x):\n    return x\n",
    "👩‍👩‍👧 family",
    "",
]


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


TOKENIZER = _tokenizer()


def _run(ids: list[int], cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[str, int | None, str | None]:
    """Text, index of the stopping token, and the stop string."""
    made = IncrementalDetokenizer(TOKENIZER, [], stop)
    text, start = "", 0
    for end in [*sorted(cuts), len(ids)]:
        pushed = made.push(ids[start:end])
        text += pushed.text
        if pushed.stop_index is not None:
            return text, start + pushed.stop_index, pushed.stop_string
        start = max(start, end)
    return text + made.flush(), None, None


@pytest.mark.parametrize("text", TEXTS)
def test_token_by_token_equals_the_whole(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert _run(ids, list(range(len(ids)))) == (TOKENIZER.decode(ids), None, None)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=30), st.data())
def test_any_tokens_in_any_cuts(ids: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    assert _run(ids, cuts)[0] == TOKENIZER.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TEXTS[:5]), st.data())
def test_the_stop_does_not_depend_on_the_cuts(text: str, data: st.DataObject) -> None:
    ids = TOKENIZER.encode(text).ids
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = (text[begin : begin + data.draw(st.integers(1, 4))], "nowhere")
    one_by_one = _run(ids, list(range(len(ids))), stop)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4))
    assert _run(ids, cuts, stop) == one_by_one
    assert one_by_one[0] == text[: text.index(stop[0])]
    assert one_by_one[2] == stop[0]


def test_half_a_character_is_never_shown() -> None:
    made = IncrementalDetokenizer(TOKENIZER, [])
    parts = [TOKENIZER.token_to_id(symbol) for symbol in pre_tokenizers.ByteLevel(False).pre_tokenize_str("🚀")[0][0]]
    assert [made.push([part]).text for part in parts] == ["", "", "", "🚀"]
    cut = IncrementalDetokenizer(TOKENIZER, [])
    assert cut.push(parts[:2]).text == ""
    assert cut.flush() == "\ufffd"


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    ids = [TOKENIZER.encode(c).ids[0] for c in "abcabd"]
    made = IncrementalDetokenizer(TOKENIZER, [], ("abd",))
    assert [made.push([i]).text for i in ids[:5]] == ["", "", "abc", "", ""]
    last = made.push(ids[5:])
    assert (last.text, last.stop_index, last.stop_string) == ("", 0, "abd")


def test_of_two_stops_the_earlier_complete_one_ends() -> None:
    ids = [TOKENIZER.encode(c).ids[0] for c in "xyzw"]
    made = IncrementalDetokenizer(TOKENIZER, [], ("yzw", "z"))
    pushed = made.push(ids)
    assert (pushed.text, pushed.stop_index, pushed.stop_string) == ("xy", 2, "z")


def test_below_the_minimum_nothing_stops() -> None:
    ids = [TOKENIZER.encode(c).ids[0] for c in "aab"]
    made = IncrementalDetokenizer(TOKENIZER, [], ("a",))
    first = made.push(ids[:1], num_below_minimum=1)
    assert (first.text, first.stop_index) == ("a", None)
    assert made.push(ids[1:]).stop_index == 0


def test_special_tokens_do_not_show() -> None:
    made = IncrementalDetokenizer(TOKENIZER, [])
    assert made.push([TOKENIZER.token_to_id("<|end|>"), *TOKENIZER.encode("ok").ids]).text == "ok"


def test_a_resumed_request_goes_on() -> None:
    rng = random.Random(1)
    ids = TOKENIZER.encode("".join(TEXTS)).ids
    for _ in range(20):
        at = rng.randrange(len(ids))
        whole = _run(ids, list(range(len(ids))), ("🙃 e",))
        assert _run(ids, [at], ("🙃 e",)) == whole
