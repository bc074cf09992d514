"""What guesses are worth: conditional scores calibrated by what became of earlier guesses.

A score says how probable a candidate is if the one above it is right. Walks show how often that was so: every child of
an accepted node was asked about, and at most one of them was right. Counts are kept by depth and by range of the score,
sampled and greedy requests apart, and fade with time. From them comes a monotone map from scores to scores, so that a
path's score stays the sum of its parts and a child stays worth no more than its parent. The map is integers to
integers: piecewise linear over evenly spaced knots, so every device can apply it bit for bit.

A map may be wrong or stale; trees built by it are trees, and any tree is lossless.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from jetflow_cluster.tree.build import MIN_SCORE, SCORE_UNIT, CandidateTable
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_kernels.cpu.trees import map_scores

#: Depths that are told apart; deeper ones count as the last.
NUM_DEPTHS = 8
#: Bounds of the ranges of scores, in nats below certainty.
BOUNDS = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0])
#: Distance of the map's knots, as a shift of fixed-point scores: 1/8 nat. Behind the last knot the slope is 1.
KNOT_SHIFT = 13
NUM_KNOTS = 129
#: Observations that the head's own probabilities count for in each range, and right guesses at each depth.
PRIOR_WEIGHT = 24.0
_RATIO_WEIGHT = 6.0
#: What is left of the counts when the maps are made anew.
FADE = 0.98
#: Steps with observations between two makings.
REFRESH_EVERY = 32
#: Least and greatest slope of the map.
_SLOPES = (0.125, 4.0)


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """One kind's counts at one depth, for plots: an entry per range of scores."""

    is_sampled: bool
    depth: int
    num_seen: np.ndarray
    #: Means of what the head said, what became of it, and what the present map says.
    said: np.ndarray
    happened: np.ndarray
    calibrated: np.ndarray


class ValueModel:
    """Calibration of conditional scores; kinds are 0 for greedy and 1 for sampled requests."""

    def __init__(self) -> None:
        shape = (2, NUM_DEPTHS, len(BOUNDS) + 1)
        self._seen, self._right, self._said = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        #: int32 ``[2, NUM_DEPTHS, NUM_KNOTS]``: nats below certainty at each knot, fixed point, non-negative and
        #: non-decreasing along the last dimension.
        self.maps = np.tile(np.arange(NUM_KNOTS, dtype=np.int32) << KNOT_SHIFT, (2, NUM_DEPTHS, 1))
        self._num_waiting = 0

    def calibrate(self, tables: Sequence[CandidateTable | None], kinds: Sequence[int]) -> list[CandidateTable | None]:
        """The tables with their scores mapped."""
        maps = np.ascontiguousarray(self.maps)
        found = list(tables)
        for i, (table, kind) in enumerate(zip(tables, kinds, strict=True)):
            if table is not None:
                found[i] = CandidateTable(ids=table.ids, scores=_mapped(table.scores, maps[kind]))
        return found

    def observe(self, trees: Sequence[DraftTree], accepted: Sequence[Sequence[int]], kinds: Sequence[int]) -> None:
        """Counts what became of the nodes of trees that were built from calibrated tables.

        Args:
            trees: each with at least one node beside its root.
            accepted: accepted nodes of each, the root first.
            kinds: of each.
        """
        sizes = np.array([tree.num_nodes for tree in trees])
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        scores = np.array([s for tree in trees for s in tree.scores], dtype=np.int64)
        parents = np.array([p for tree in trees for p in tree.parents]) + np.repeat(starts, sizes)
        depths = np.array([d for tree in trees for d in tree.depths])
        is_right = np.zeros(len(scores), bool)
        is_right[[start + node for start, nodes in zip(starts, accepted, strict=True) for node in nodes]] = True
        roots = depths == 0
        asked = np.flatnonzero(~roots & is_right[np.where(roots, 0, parents)])
        if len(asked):
            kind = np.repeat(np.asarray(kinds), sizes)[asked]
            depth = np.minimum(depths[asked], NUM_DEPTHS) - 1
            raw = self._uncalibrated(kind * NUM_DEPTHS + depth, scores[parents[asked]] - scores[asked])
            place = (kind, depth, np.searchsorted(BOUNDS, raw))
            np.add.at(self._seen, place, 1.0)
            np.add.at(self._said, place, np.exp(-raw))
            np.add.at(self._right, place, is_right[asked].astype(float))
            self._num_waiting += 1
            if self._num_waiting >= REFRESH_EVERY:
                self.refresh()

    def refresh(self) -> None:
        """Makes the maps from the counts, and lets the counts fade."""
        self._num_waiting = 0
        for kind in range(2):
            for depth in range(NUM_DEPTHS):
                if self._seen[kind, depth].sum() >= 1.0:
                    self.maps[kind, depth] = self._map(kind, depth)
        for counts in (self._seen, self._right, self._said):
            counts *= FADE

    def reliability(self) -> list[Reliability]:
        """What is known, by kind and depth, where anything is."""
        found = []
        for kind in range(2):
            for depth in range(NUM_DEPTHS):
                seen = self._seen[kind, depth]
                used = seen > 0.5
                if not used.any():
                    continue
                said = self._said[kind, depth][used] / seen[used]
                knots = np.arange(NUM_KNOTS) / 8.0
                mapped = np.interp(-np.log(said), knots, self.maps[kind, depth] / SCORE_UNIT)
                found.append(
                    Reliability(
                        is_sampled=bool(kind),
                        depth=depth + 1,
                        num_seen=seen[used],
                        said=said,
                        happened=self._right[kind, depth][used] / seen[used],
                        calibrated=np.exp(-mapped),
                    )
                )
        return found

    def _map(self, kind: int, depth: int) -> np.ndarray:
        """One row of `maps`: shares of right guesses, made monotone. Each range is drawn towards what the head said
        there, times how far it was right at this depth in all."""
        seen, right, said = (counts[kind, depth] for counts in (self._seen, self._right, self._said))
        middles = np.exp(-np.concatenate((BOUNDS[:1] / 2, (BOUNDS[1:] + BOUNDS[:-1]) / 2, BOUNDS[-1:] + 1.0)))
        own = np.where(seen > 0.5, said / np.maximum(seen, 1e-9), middles)
        ratio = (right.sum() + _RATIO_WEIGHT) / (said.sum() + _RATIO_WEIGHT)
        prior = np.minimum(own * ratio, 1.0)
        shares = _falling((right + PRIOR_WEIGHT * prior) / (seen + PRIOR_WEIGHT), seen + PRIOR_WEIGHT)
        x, y = -np.log(own), -np.log(np.clip(shares, 1e-6, 1.0))
        x = np.maximum.accumulate(x + np.arange(len(x)) * 1e-9)
        knots = np.arange(NUM_KNOTS) / 8.0
        nats = np.interp(knots, x, y)
        nats = np.where(knots < x[0], np.maximum(y[0] - (x[0] - knots), 0.0), nats)
        nats = np.where(knots > x[-1], y[-1] + (knots - x[-1]), nats)
        steps = np.clip(np.diff(nats), _SLOPES[0] / 8, _SLOPES[1] / 8)
        row = np.concatenate((nats[:1], nats[0] + np.cumsum(steps)))
        return np.rint(row * SCORE_UNIT).astype(np.int32)

    def _uncalibrated(self, rows: np.ndarray, mapped: np.ndarray) -> np.ndarray:
        """Nats below certainty of conditional scores before they were mapped."""
        knots = np.arange(NUM_KNOTS) / 8.0
        found = np.empty(len(rows))
        flat = self.maps.reshape(-1, NUM_KNOTS)
        for row in np.unique(rows):
            at = rows == row
            found[at] = np.interp(mapped[at], flat[row], knots)
        return found


def promised_tokens(tree: DraftTree) -> float:
    """Accepted tokens that a tree's scores foretell."""
    return sum(math.exp(score / SCORE_UNIT) for score in tree.scores[1:])


def apply_maps(maps: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Conditional scores through the map of each.

    Args:
        maps: int32 ``[M, NUM_KNOTS]``.
        rows: which map each score takes, int ``[N]``.
        scores: int32 ``[N]``, at most 0.

    Returns:
        int32 ``[N]`` within [`MIN_SCORE`, 0].
    """
    # All within 32 bits: slopes are bounded, and scores.
    nats = -scores
    knot = np.minimum(nats >> KNOT_SHIFT, NUM_KNOTS - 2)
    flat, at = maps.ravel(), rows * NUM_KNOTS + knot
    low = flat[at]
    nats -= knot << KNOT_SHIFT
    within = np.minimum(nats, 1 << KNOT_SHIFT)
    # Behind the last knot the slope is 1.
    mapped = nats - within
    mapped += low
    within *= flat[at + 1] - low
    within >>= KNOT_SHIFT
    mapped += within
    return np.negative(np.clip(mapped, 0, -MIN_SCORE, out=mapped), out=mapped)


def _mapped(scores: torch.Tensor, maps: np.ndarray) -> torch.Tensor:
    """Scores ``[D, P, W]`` through the maps of one kind of requests, ``[NUM_DEPTHS, NUM_KNOTS]``."""
    found = map_scores(scores, torch.from_numpy(maps), knot_shift=KNOT_SHIFT, worst=-MIN_SCORE)
    if found is None:
        flat = np.ascontiguousarray(scores.cpu().numpy()).ravel()
        found = torch.from_numpy(apply_maps(maps, _rows_of(tuple(scores.shape)), flat).reshape(scores.shape))
    return found


@lru_cache(64)
def _rows_of(shape: tuple[int, ...]) -> np.ndarray:
    """Depth, from 0, that each entry of flattened scores ``[D, P, W]`` is counted under."""
    return np.repeat(np.minimum(np.arange(shape[0]), NUM_DEPTHS - 1), shape[1] * shape[2])


def _falling(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest non-increasing sequence in weighted squares (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([float(value), float(weight), 1])
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            last, before = blocks.pop(), blocks.pop()
            weight = last[1] + before[1]
            blocks.append([(last[0] * last[1] + before[0] * before[1]) / weight, weight, last[2] + before[2]])
    return np.repeat([b[0] for b in blocks], [int(b[2]) for b in blocks])
