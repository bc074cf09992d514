"""Text comes in whole characters, stops exactly, and does not depend on how tokens are cut into steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jetflow_cluster.engine.detokenizer import IncrementalDetokenizer

TEXTS = [
    "naïve café 🙂🙃 end",
    "e\u0301 combining o\u0302\u0323",
    "日本語のテキスト",
    "def f(x):\n    return x\n",
    "👩‍👩‍👧 family 🇩🇪",
    "literal \ufffd\ufffd mark",
    "",
]
PARTIAL = "\ufffd"


def _byte_level() -> Tokenizer:
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


def _byte_fallback() -> Tokenizer:
    """Pieces with a mark for the space; what is in no piece is spelled in bytes."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefinorst", "▁a", "▁an", "an"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "n"), ("a", "n")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def _words() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "the", "lazy", "##ness", ".", "do", "##n't"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


TOKENIZER = _byte_level()
FALLBACK = _byte_fallback()
END = TOKENIZER.token_to_id("<|end|>")


def _symbols(data: bytes) -> str:
    """How byte-level vocabularies write bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return "".join(chr(b) if b in printable else chr(256 + others.index(b)) for b in data)


def _bytes(data: bytes) -> list[int]:
    """Tokens of single bytes, whole characters or not."""
    return [TOKENIZER.token_to_id(symbol) for symbol in _symbols(data)]


def _straddling() -> Tokenizer:
    """Tokens that begin and end inside characters, as merges across characters make them."""
    wide, smile, accent = "日".encode(), "🙂".encode(), "é".encode()
    pieces = [wide[:1], wide[1:], wide[1:] + wide[:1], wide[1:] + smile[:3], smile[:3], smile[3:], smile[3:] + wide[:2]]
    pieces += [smile[1:2], smile[2:3], smile[3:] + smile[:1], smile[:1], wide[1:] + smile[:1]]
    pieces += [wide[2:], accent[:1], accent[1:] + accent[:1], accent[1:], smile + wide[:1], smile[1:], b"\xff", b"a"]
    tokenizer = Tokenizer(models.WordLevel({_symbols(piece): i for i, piece in enumerate(pieces)}, unk_token="?"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


STRADDLING = _straddling()


def _fallback_bytes(data: bytes) -> list[int]:
    return [FALLBACK.token_to_id(f"<0x{b:02X}>") for b in data]


def _run(
    ids: Sequence[int],
    cuts: Sequence[int] = (),
    stop: Sequence[str] = (),
    *,
    tokenizer: Tokenizer = TOKENIZER,
    prompt: Sequence[int] = (),
    minimum: int = 0,
) -> tuple[str, int | None, str | None]:
    """Text, index of the stopping token, and the stop string."""
    made = IncrementalDetokenizer(tokenizer, prompt, stop)
    text, start = "", 0
    for end in [*sorted(cuts), len(ids)]:
        pushed = made.push(ids[start:end], num_below_minimum=max(0, minimum - start))
        text += pushed.text
        if pushed.stop_index is not None:
            assert made.flush() == ""
            return text, start + pushed.stop_index, pushed.stop_string
        start = end
    return text + made.flush(), None, None


def _expected(
    ids: Sequence[int], stop: Sequence[str], minimum: int, tokenizer: Tokenizer = TOKENIZER
) -> tuple[str, int | None, str | None]:
    """The definition, by decoding every beginning as a whole (byte-level)."""
    text = tokenizer.decode(ids)
    #: Characters that are certain once the token has come.
    certain: list[int] = []
    for i in range(len(ids)):
        start = tokenizer.decode(ids[: i + 1])
        certain.append(len(start) - min(3, len(start) - len(start.rstrip(PARTIAL))))
    found = []
    for string in stop:
        for end in range(len(string), len(text) + 1):
            if text[:end].endswith(string):
                index = next((i for i, count in enumerate(certain) if count >= end), None)
                if index is not None and index >= minimum:
                    found.append((end, -len(string), string, index))
    if not found:
        return text, None, None
    end, size, string, index = min(found)
    return text[: end + size], index, string


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_token_by_token_equals_the_whole(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text).ids
    assert _run(ids, range(len(ids)), tokenizer=tokenizer) == (tokenizer.decode(ids), None, None)


def test_words() -> None:
    tokenizer = _words()
    ids = tokenizer.encode("the laziness . do").ids + [1, 2, 3, 4, 5, 6, 1]
    assert _run(ids, range(len(ids)), tokenizer=tokenizer)[0] == tokenizer.decode(ids)


TOKEN_IDS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() + 2), max_size=30)
#: Bytes of characters of two to four bytes, in any order.
BYTE_IDS = st.lists(st.sampled_from(_bytes("é日🙂".encode() + b"a\xff")), max_size=60)


@settings(max_examples=300, deadline=None)
@given(TOKEN_IDS | BYTE_IDS, st.data())
def test_any_tokens_in_any_cuts(ids: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    prompt = data.draw(st.sampled_from([[], TOKENIZER.encode("日本").ids, _bytes("🙂".encode()[:2])]))
    assert _run(ids, cuts, prompt=prompt)[0] == TOKENIZER.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, FALLBACK.get_vocab_size() - 1), max_size=20), st.data())
@example(_fallback_bytes("日".encode() + "日".encode()[:1]) + [260], None)
def test_any_tokens_in_any_cuts_with_byte_fallback(ids: list[int], data: st.DataObject | None) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6)) if data is not None else []
    prompt = FALLBACK.encode("an an").ids
    whole = _run(ids, range(len(ids)), tokenizer=FALLBACK, prompt=prompt)
    assert _run(ids, cuts, tokenizer=FALLBACK, prompt=prompt) == whole


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(TEXTS[:6]).map(lambda text: TOKENIZER.encode(text).ids) | BYTE_IDS | TOKEN_IDS, st.data())
def test_the_stop_is_the_defined_one_in_any_cuts(ids: list[int], data: st.DataObject) -> None:
    text = TOKENIZER.decode(ids) or "x"
    begins = data.draw(st.lists(st.integers(0, len(text) - 1), max_size=3))
    stop = [text[begin : begin + data.draw(st.integers(1, 5))] for begin in begins] + ["nowhere"]
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4))
    minimum = data.draw(st.sampled_from([0, 0, 1, 2, 5, 9]))
    assert _run(ids, cuts, stop, minimum=minimum) == _expected(ids, stop, minimum)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, STRADDLING.get_vocab_size() - 2), max_size=120), st.data())
def test_tokens_that_straddle_characters(ids: list[int], data: st.DataObject) -> None:
    stop = data.draw(st.lists(st.text("日🙂é", min_size=1, max_size=4), max_size=2))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4))
    assert _run(ids, cuts, stop, tokenizer=STRADDLING) == _expected(ids, stop, 0, STRADDLING)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(_bytes(b"ab")), max_size=24), st.data())
def test_stops_that_repeat_and_overlap(ids: list[int], data: st.DataObject) -> None:
    stop = data.draw(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4))
    minimum = data.draw(st.integers(0, 6))
    assert _run(ids, cuts, stop, minimum=minimum) == _expected(ids, stop, minimum)


@pytest.mark.parametrize("symbol", ["é", "日", "🚀"])
def test_half_a_character_is_never_shown(symbol: str) -> None:
    parts = _bytes(symbol.encode())
    made = IncrementalDetokenizer(TOKENIZER, [])
    assert [made.push([part]).text for part in parts] == [""] * (len(parts) - 1) + [symbol]
    cut = IncrementalDetokenizer(TOKENIZER, [])
    assert cut.push(parts[:-1]).text == ""
    assert cut.flush() == PARTIAL


def test_whole_characters_do_not_wait_for_a_half_one() -> None:
    made = IncrementalDetokenizer(TOKENIZER, [], ("!",))
    assert made.push(_bytes("ab日".encode()[:-1])).text == "ab"
    space = _bytes("! 日".encode()[:-1])
    pushed = IncrementalDetokenizer(TOKENIZER, [], ("!",)).push(space)
    assert (pushed.text, pushed.stop_index) == ("", 0)


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    ids = _bytes(b"abcabd")
    made = IncrementalDetokenizer(TOKENIZER, [], ("abd",))
    assert [made.push([i]).text for i in ids[:5]] == ["", "", "abc", "", ""]
    last = made.push(ids[5:])
    assert (last.text, last.stop_index, last.stop_string) == ("", 0, "abd")
    assert made.flush() == ""


def _pieces(*pieces: str) -> tuple[Tokenizer, list[int]]:
    """A tokenizer of these pieces, and their ids."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer, [tokenizer.token_to_id(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "index", "matched"),
    [
        (["xx", "aENDb", "c"], ["END"], "xxa", 1, "END"),
        (["xE", "N", "Db"], ["END"], "x", 2, "END"),
        (["x", "EN", "EN", "D"], ["END"], "xEN", 3, "END"),
        (["a", "aa", "b"], ["aab"], "a", 2, "aab"),
        (["x", "y", "z", "w"], ["yzw", "z"], "xy", 2, "z"),
        (["xyzw"], ["yzw", "z"], "xy", 0, "z"),
        (["xyz"], ["z", "xyz", "yz"], "", 0, "xyz"),
        (["xyz", "EN"], ["END", "?"], "xyzEN", None, None),
        (["x\n", "\ny"], ["\n\n"], "x", 1, "\n\n"),
        (["x日", "本y"], ["日本"], "x", 1, "日本"),
        (["e", "\u0301", "x"], ["e\u0301"], "", 1, "e\u0301"),
    ],
    ids=[
        "inside-one-token",
        "across-three-tokens",
        "false-start",
        "overlaps-itself",
        "first-complete-wins",
        "first-complete-wins-in-one-token",
        "longest-of-one-end",
        "never-complete",
        "newlines",
        "wide-characters",
        "combining-character",
    ],
)
def test_stops(pieces: list[str], stop: list[str], text: str, index: int | None, matched: str | None) -> None:
    tokenizer, ids = _pieces(*pieces)
    for cuts in ([], range(len(ids)), [1]):
        assert _run(ids, cuts, stop, tokenizer=tokenizer) == (text, index, matched)


@pytest.mark.parametrize(
    ("text", "stop", "minimum", "expected"),
    [
        ("aab", "a", 1, ("a", 1)),
        ("aab", "a", 2, ("aab", None)),
        ("xabx", "ab", 2, ("x", 2)),
        ("xabxab", "ab", 3, ("xabx", 5)),
        ("aaaa", "aa", 2, ("a", 2)),
        ("xab", "ab", 9, ("xab", None)),
    ],
    ids=["at-it", "behind-it", "begins-below", "complete-below", "overlaps-it", "all-below"],
)
def test_below_the_minimum_nothing_stops(text: str, stop: str, minimum: int, expected: tuple[str, int | None]) -> None:
    ids = _bytes(text.encode())
    for cuts in ([], range(len(ids)), [1]):
        assert _run(ids, cuts, [stop], minimum=minimum)[:2] == expected


def test_what_cannot_stop_is_not_held_back() -> None:
    made = IncrementalDetokenizer(TOKENIZER, [], ("abc",))
    assert made.push(_bytes(b"abc"), num_below_minimum=3).text == "abc"


def test_special_and_unknown_tokens_do_not_show() -> None:
    made = IncrementalDetokenizer(TOKENIZER, [])
    assert made.push([END, *_bytes(b"o"), 10**6, *_bytes(b"k")]).text == "ok"
    rocket = _bytes("🚀".encode())
    assert "".join(made.push([token]).text for part in rocket for token in (part, *[END] * 40)) == "🚀"


def test_the_first_token_keeps_its_space_behind_a_prompt() -> None:
    ids = FALLBACK.encode("an an").ids
    assert FALLBACK.decode(ids) == "an an"
    assert _run(ids, tokenizer=FALLBACK, prompt=ids)[0] == " an an"
    assert _run(ids, tokenizer=FALLBACK)[0] == "an an"


def test_a_shown_character_stays_when_a_byte_fallback_decoder_takes_it_back() -> None:
    ids = [*_fallback_bytes("日".encode()), *_fallback_bytes(b"\xe6"), FALLBACK.token_to_id("an")]
    assert FALLBACK.decode(ids) == PARTIAL * 4 + "an"
    for cuts in ([], range(len(ids))):
        assert _run(ids, cuts, tokenizer=FALLBACK)[0] == f"日{PARTIAL}an"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TEXTS[:6]), st.data())
def test_a_resumed_request_goes_on(text: str, data: st.DataObject) -> None:
    ids = TOKENIZER.encode(text).ids
    stop = [text[-3:]]
    at = data.draw(st.integers(0, len(ids)))
    whole = IncrementalDetokenizer(TOKENIZER, [], stop)
    before = "".join(whole.push([token]).text for token in ids[:at])
    resumed = IncrementalDetokenizer(TOKENIZER, [], stop)
    assert resumed.push(ids[:at]).text == before
    for token in ids[at:]:
        told, again = whole.push([token]), resumed.push([token])
        assert told == again
        if told.stop_index is not None:
            break
    assert whole.flush() == resumed.flush()


class _Counting:
    """A tokenizer that notes how many tokens it is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_decoded: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded.append(len(ids))
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    "unit",
    [
        pytest.param(_bytes(b"text "), id="text"),
        pytest.param([END], id="special"),
        pytest.param(_bytes(b"\xff"), id="invalid"),
        pytest.param(_bytes(b"\x80"), id="continuation"),
        pytest.param(_bytes(b"\xf0\x9f\x98"), id="always-half"),
        pytest.param(_bytes(PARTIAL.encode()), id="literal-replacement"),
    ],
)
def test_a_token_costs_the_same_at_any_length(unit: list[int]) -> None:
    ids = _bytes("日".encode()[:1]) + unit * (1000 // len(unit))
    counting = _Counting(TOKENIZER)
    assert _run(ids, range(0, len(ids), 7), ["nowhere"], tokenizer=counting)[0] == TOKENIZER.decode(ids)  # type: ignore[arg-type]
    assert max(counting.num_decoded) <= 40
    assert len(counting.num_decoded) <= 2 * len(ids) + 2


def _straddling_ids(*pieces: bytes) -> list[int]:
    return [STRADDLING.token_to_id(_symbols(piece)) for piece in pieces]


def test_a_token_that_always_ends_inside_a_character() -> None:
    """Text must not wait for a token that ends with a whole character."""
    ids = _straddling_ids(b"\xe6", *[b"\x97\xa5\xe6"] * 200, b"\x97\xa5")
    made = IncrementalDetokenizer(STRADDLING, [])
    assert [made.push([token]).text for token in ids] == ["", *["日"] * 201]
    assert _run(ids, stop=["日" * 90], tokenizer=STRADDLING) == ("", 90, "日" * 90)


@pytest.mark.parametrize("num_before", range(20, 36))
def test_tokens_are_let_go_wherever_a_character_stands(num_before: int) -> None:
    half = (b"\x9f", b"\x99")
    end = (b"\x97\xa5\xf0", *half, b"\x82\xf0", *half, b"\xf0", *half, b"a")
    ids = _straddling_ids(b"\xe6", *[b"\x97\xa5\xe6"] * num_before, *end)
    assert _run(ids, range(len(ids)), tokenizer=STRADDLING)[0] == STRADDLING.decode(ids)
