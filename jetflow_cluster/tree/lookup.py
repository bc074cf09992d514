"""Candidates from a request's own text: what followed the last time that it ended like this.

Text repeats itself, and a draft head that guesses each depth from hidden states alone loses the thread of a long
repetition. The longest earlier match of the last tokens (as in prompt lookup decoding and in LZ77, whose chains of
equal beginnings are used here) says how the text would go on; that guess is mixed into the head's own candidates.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from jetflow_cluster.tree.build import MIN_SCORE, SCORE_UNIT, CandidateTable

#: Deepest guess of a lookup.
MAX_LOOKUP_DEPTH = 24
#: Longest match that is told apart.
MAX_MATCH = 32
#: From this length on a match may guess by itself, where no head does.
LONE_MATCH = 6
#: Earlier places with the same last three tokens that are compared, the latest first.
_MAX_PLACES = 24
#: Guesses less probable than this, by their weights and those above them, are not worth their place in a table.
_LEAST_CHANCE = 0.01
#: Least match of each row of `LOOKUP_WEIGHTS`.
MATCH_BOUNDS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True, kw_only=True)
class ContextMatch:
    """An earlier place of the text that ends like its end."""

    #: Equal tokens, at most `MAX_MATCH`.
    length: int
    #: What followed there, as many tokens as were asked for; a repetition goes on repeating.
    token_ids: list[int]

    def cut(self) -> ContextMatch:
        """Without the guesses that are worth nothing."""
        reach = _WEIGHTS[_row_of(self)].reach
        return self if reach >= len(self.token_ids) else replace(self, token_ids=self.token_ids[:reach])


@dataclass(frozen=True, kw_only=True)
class ContextGuess:
    """The part of a match in a tree's candidates."""

    #: What the match says, from depth 1 on.
    token_ids: list[int]
    #: How many of these tokens, the first ones, are candidates of the drafter too.
    num_shared: int


class ContextIndex:
    """Finds matches in one growing text; `extend` takes constant time per token."""

    __slots__ = ("_before", "_latest", "_tokens")

    def __init__(self) -> None:
        self._tokens: list[int] = []
        #: Last token of the latest place of each run of one, two and three tokens.
        self._latest: dict[int | tuple[int, ...], int] = {}
        #: For each place the one before it with the same three last tokens; -1 for none.
        self._before: list[int] = []

    def match(self, token_ids: Sequence[int], num_tokens: int) -> ContextMatch | None:
        """The longest earlier match of the end of a text, the latest of equally long ones.

        Args:
            token_ids: the text; it begins with what was given before.
            num_tokens: tokens wanted.

        Returns:
            None when the last token is new.
        """
        self._extend(token_ids)
        tokens, end = self._tokens, len(self._tokens) - 1
        place, length = self._longest(end)
        if not length:
            return None
        guess = tokens[place + 1 : place + 1 + num_tokens]
        period = end - place
        while len(guess) < num_tokens:
            guess.append(guess[-period])
        return ContextMatch(length=length, token_ids=guess)

    def _extend(self, token_ids: Sequence[int]) -> None:
        """Enters all places but the end itself, which must not be found."""
        tokens, latest, before = self._tokens, self._latest, self._before
        first = max(0, len(tokens) - 1)
        tokens.extend(token_ids[len(tokens) :])
        for place in range(first, len(tokens) - 1):
            one = tokens[place]
            latest[one] = place
            if place:
                latest[tokens[place - 1], one] = place
            key = tuple(tokens[place - 2 : place + 1]) if place > 1 else ()
            before.append(latest.get(key, -1) if key else -1)
            if key:
                latest[key] = place

    def _longest(self, end: int) -> tuple[int, int]:
        """Last token of the best place, and the length of its match; 0 for none."""
        tokens, latest = self._tokens, self._latest
        if end < 1:
            return -1, 0
        best, length, num_left = -1, 0, _MAX_PLACES
        place = latest.get(tuple(tokens[end - 2 : end + 1]), -1) if end > 1 else -1
        while place >= 0 and num_left and length < MAX_MATCH:
            found = 3
            most = min(MAX_MATCH, place + 1)
            while found < most and tokens[place - found] == tokens[end - found]:
                found += 1
            if found > length:
                best, length = place, found
            place = self._before[place]
            num_left -= 1
        if length:
            return best, length
        place = latest.get((tokens[end - 1], tokens[end]), -1)
        if place >= 0:
            return place, 2
        place = latest.get(tokens[end], -1)
        return place, int(place >= 0)


#: Weight of a lookup's guess in the mixture with the head's candidates: a row per least match, a column per depth (the
#: last one for all deeper). A guess is only asked about where the ones above it were right, so weights grow with depth.
#: `jetflow_cluster.training.calibration` fits them.
LOOKUP_WEIGHTS = (
    (0.025, 0.140, 0.384, 0.558, 0.720, 0.797, 0.818, 0.930),
    (0.048, 0.244, 0.484, 0.708, 0.798, 0.803, 0.875, 0.940),
    (0.137, 0.376, 0.641, 0.750, 0.806, 0.874, 0.812, 0.948),
    (0.300, 0.499, 0.716, 0.777, 0.858, 0.785, 0.883, 0.952),
    (0.380, 0.587, 0.738, 0.825, 0.760, 0.876, 0.889, 0.957),
    (0.551, 0.641, 0.727, 0.778, 0.864, 0.894, 0.898, 0.963),
    (0.631, 0.672, 0.828, 0.869, 0.888, 0.892, 0.911, 0.976),
    (0.748, 0.767, 0.858, 0.902, 0.927, 0.945, 0.957, 0.983),
    (0.865, 0.894, 0.937, 0.943, 0.958, 0.968, 0.972, 0.989),
    (0.941, 0.937, 0.964, 0.977, 0.978, 0.980, 0.985, 0.993),
    (0.980, 0.980, 0.988, 0.990, 0.992, 0.993, 0.994, 0.997),
)

#: Tokens expected of the first n guesses of a match alone, ``[len(MATCH_BOUNDS), MAX_LOOKUP_DEPTH]``, column n - 1.
MATCH_GAINS = np.array(
    [np.cumprod([row[min(d, len(row) - 1)] for d in range(MAX_LOOKUP_DEPTH)]) for row in LOOKUP_WEIGHTS]
).cumsum(1)


def mix_lookup(table: CandidateTable, match: ContextMatch) -> CandidateTable:
    """A new table in which each guess of a match has its weight among the candidates.

    Under the candidate that carries the match's token above, the scores become those of
    ``(1 - weight) * candidates + weight * guess``; other rows stay. A guess that is no candidate takes the place of the
    worst one if it is worth more. Depths below the table's own hold the match's guess alone.

    Args:
        table: of the head, for a greedy request.
        match: of the request's tokens.
    """
    guesses, weights = match.token_ids, _WEIGHTS[_row_of(match)]
    num_own, width = table.ids.shape
    num_depths = max(num_own, len(guesses))
    ids = np.zeros((num_depths, width), np.int64)
    scores = np.full((num_depths, width, width), MIN_SCORE, np.int32)
    ids[:num_own] = table.ids.numpy()
    scores[:num_own] = table.scores.numpy()
    places = _take_places(ids[:num_own], scores[:num_own], guesses, weights.fixed)
    num_mixed = len(places)
    if not num_mixed:
        return table
    depths, above = np.arange(num_mixed), [0, *places[:-1]]
    weight = weights.shares[:num_mixed]
    shares = (1.0 - weight)[:, None] * np.exp(scores[depths, above] / SCORE_UNIT)
    shares[depths, places] += weight
    scores[depths, above] = _fixed(shares)
    if num_mixed == num_own < len(guesses):
        # Below the head's own depths there is the guess alone.
        ids[num_own:, 0] = guesses[num_own:]
        scores[num_own, places[-1], 0] = weights.fixed[num_own]
        scores[num_own + 1 :, 0, 0] = weights.fixed[num_own + 1 : num_depths]
    return CandidateTable(ids=torch.from_numpy(ids), scores=torch.from_numpy(scores))


def _take_places(ids: np.ndarray, scores: np.ndarray, guesses: Sequence[int], fixed: np.ndarray) -> list[int]:
    """Where each guess is among the candidates of its depth; one that is none of them takes the place of the worst, or
    ends the list if it is worth less."""
    places: list[int] = []
    above, last = 0, ids.shape[1] - 1
    candidates = ids.tolist()
    for d, guess in enumerate(guesses[: len(candidates)]):
        if guess in candidates[d]:
            above = candidates[d].index(guess)
        else:
            if fixed[d] <= scores[d, above, last]:
                break
            ids[d, last], scores[d, :, last], above = guess, MIN_SCORE, last
            if d + 1 < len(candidates):
                # What the head says behind a token that is none of its candidates: the mean of what it says at all.
                scores[d + 1, last] = _fixed(np.exp(scores[d + 1] / SCORE_UNIT).mean(0))
        places.append(above)
    return places


def guess_of(match: ContextMatch, table: CandidateTable | None) -> ContextGuess:
    """Which of a match's tokens the drafter's own candidates hold; None where it was not asked."""
    own = [] if table is None else table.ids.tolist()
    num_shared = 0
    for token, candidates in zip(match.token_ids, own, strict=False):
        if token not in candidates:
            break
        num_shared += 1
    return ContextGuess(token_ids=match.token_ids, num_shared=num_shared)


def lookup_table(match: ContextMatch) -> CandidateTable:
    """A match's guesses alone, each with its weight."""
    scores = torch.from_numpy(_WEIGHTS[_row_of(match)].fixed[: len(match.token_ids)].copy())
    return CandidateTable(ids=torch.tensor(match.token_ids)[:, None], scores=scores[:, None, None])


def guess_weights(match: ContextMatch) -> list[float]:
    """One per guess."""
    return list(_WEIGHTS[_row_of(match)].shares[: len(match.token_ids)].tolist())


def _row_of(match: ContextMatch) -> int:
    return bisect_right(MATCH_BOUNDS, match.length) - 1


def _fixed(shares: np.ndarray | float) -> np.ndarray:
    """Probabilities to fixed-point scores, int32."""
    with np.errstate(divide="ignore"):
        return np.clip(np.rint(np.log(shares) * SCORE_UNIT), MIN_SCORE, 0).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """A row of `LOOKUP_WEIGHTS` at every depth."""

    shares: np.ndarray
    fixed: np.ndarray
    #: Guesses that are worth something, the first ones.
    reach: int


_WEIGHTS = [
    _Weights(shares=shares, fixed=_fixed(shares), reach=int((np.cumprod(shares) >= _LEAST_CHANCE).sum()))
    for shares in (np.array([row[min(d, len(row) - 1)] for d in range(MAX_LOOKUP_DEPTH)]) for row in LOOKUP_WEIGHTS)
]
