"""Matches against a search of the whole text; mixed tables against the formula, row by row."""

from __future__ import annotations

import math
import random

import pytest
import torch

from jetflow_cluster.tree.build import MIN_SCORE, SCORE_UNIT, CandidateTable, build_trees
from jetflow_cluster.tree.lookup import (
    LOOKUP_WEIGHTS,
    MATCH_BOUNDS,
    MAX_LOOKUP_DEPTH,
    MAX_MATCH,
    ContextIndex,
    ContextMatch,
    lookup_table,
    mix_lookup,
)


def longest_match(text: list[int]) -> int:
    """Length of the longest earlier match of the text's end, at most MAX_MATCH."""
    end, best = len(text) - 1, 0
    for place in range(end):
        length = 0
        while length < MAX_MATCH and length <= place and text[place - length] == text[end - length]:
            length += 1
        best = max(best, length)
    return best


@pytest.mark.parametrize(("vocab", "length"), [(1, 40), (2, 60), (3, 90), (8, 200), (50, 200)])
def test_matches_of_growing_texts(vocab: int, length: int) -> None:
    rng = random.Random(vocab)
    text = [rng.randrange(vocab) for _ in range(length)]
    index, start = ContextIndex(), 1
    while start <= length:
        part = text[:start]
        match = index.match(part, 9)
        expected = longest_match(part)
        if match is None:
            assert expected == 0
        else:
            # Only so many earlier places are compared: in a text of few tokens a longer one may be further back.
            assert match.length == expected or (vocab <= 3 and 3 <= match.length < expected)
            assert_follows(part, match)
        start += rng.choice((1, 1, 2, 5))


def assert_follows(text: list[int], match: ContextMatch) -> None:
    """What is guessed did follow some earlier place of this match, repeated where the text ends."""
    end, n = len(text) - 1, match.length
    for place in range(n - 1, end):
        if text[place - n + 1 : place + 1] == text[end - n + 1 :]:
            longer = text[: end + 1]
            for guess in range(len(match.token_ids)):
                longer.append(longer[place + 1 + guess])
            if longer[end + 1 :] == match.token_ids:
                return
    raise AssertionError(f"{match} follows nowhere in {text}")


def test_a_repetition_goes_on_repeating() -> None:
    match = ContextIndex().match([9, 1, 2, 3, 1, 2, 3, 1, 2], 8)
    assert match == ContextMatch(length=5, token_ids=[3, 1, 2, 3, 1, 2, 3, 1])


@pytest.mark.parametrize("text", [[], [4], [1, 2, 3]], ids=["empty", "one", "all-new"])
def test_nothing_to_find(text: list[int]) -> None:
    assert ContextIndex().match(text, 4) is None


def random_table(depth: int, width: int, parents: int, seed: int) -> CandidateTable:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(40, generator=generator)[:width] for _ in range(depth)])
    logprobs = torch.randn(depth, parents, width + 1, generator=generator).log_softmax(-1)[..., :-1]
    scores = (logprobs * SCORE_UNIT).round().int().sort(-1, descending=True).values
    return CandidateTable(ids=ids, scores=scores)


@pytest.mark.parametrize("num_guesses", [1, 3, 5, 12])
@pytest.mark.parametrize("parents", [1, 6])
@pytest.mark.parametrize("length", [1, 7, 32])
def test_rows_of_a_mixed_table(num_guesses: int, parents: int, length: int) -> None:
    depth, width = 5, 6
    table = random_table(depth, width, parents, seed=num_guesses)
    # Guesses that are candidates and guesses that are none, in turn.
    guesses = [int(table.ids[d, 2]) if d % 2 == 0 and d < depth else 100 + d for d in range(num_guesses)]
    before = table.scores.clone()
    mixed = mix_lookup(table, ContextMatch(length=length, token_ids=guesses))
    assert torch.equal(table.scores, before)
    row_of = max(i for i, bound in enumerate(MATCH_BOUNDS) if bound <= length)
    above = 0
    for d, guess in enumerate(guesses):
        weight = LOOKUP_WEIGHTS[row_of][min(d, len(LOOKUP_WEIGHTS[0]) - 1)]
        places = (mixed.ids[d] == guess).nonzero().flatten().tolist()
        if not places:
            worst = before[d, min(above, parents - 1), -1]
            assert math.log(weight) * SCORE_UNIT <= worst + 1
            return
        place = places[0]
        share = math.exp(int(mixed.scores[d, 0 if d == 0 else above, place]) / SCORE_UNIT)
        if d >= depth:
            assert share == pytest.approx(weight, rel=1e-4)
        elif guess < 100 and (d == 0 or guesses[d - 1] < 100 or parents == 1):
            own = math.exp(int(before[d, min(0 if d == 0 else above, parents - 1), 2]) / SCORE_UNIT)
            assert share == pytest.approx((1 - weight) * own + weight, rel=1e-3)
        elif guess >= 100:
            assert share == pytest.approx(weight, rel=1e-3)
            others = [p for p in range(width) if p != above]
            assert d == 0 or all(int(mixed.scores[d, p, place]) == MIN_SCORE for p in others)
        above = place


def test_rows_under_other_candidates_stay() -> None:
    table = random_table(4, 6, 6, seed=3)
    guesses = [int(table.ids[d, 1]) for d in range(4)]
    mixed = mix_lookup(table, ContextMatch(length=8, token_ids=guesses))
    others = [0, 2, 3, 4, 5]
    assert torch.equal(mixed.ids, table.ids)
    assert torch.equal(mixed.scores[1:, others], table.scores[1:, others])


def test_a_weak_guess_takes_no_place_from_a_better_candidate() -> None:
    table = CandidateTable(ids=torch.tensor([[5]]), scores=torch.tensor([[[-100]]], dtype=torch.int32))
    mixed = mix_lookup(table, ContextMatch(length=1, token_ids=[9, 9]))
    assert mixed.ids[0].tolist() == [5]


def test_trees_of_mixed_tables_reach_below_the_heads_depths() -> None:
    guesses = list(range(50, 50 + MAX_LOOKUP_DEPTH))
    match = ContextMatch(length=MAX_MATCH, token_ids=guesses)
    for table in (mix_lookup(random_table(4, 6, 6, seed=5), match), lookup_table(match)):
        tree = build_trees([table], [1], max_nodes=[40], max_depths=[MAX_LOOKUP_DEPTH])[0]
        tree.validate()
        assert max(tree.depths) == MAX_LOOKUP_DEPTH
        deepest = tree.depths.index(MAX_LOOKUP_DEPTH)
        assert [tree.token_ids[node] for node in tree.path(deepest)[1:]] == guesses
