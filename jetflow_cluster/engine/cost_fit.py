"""From measured steps to a `CostModel`: least squares with no negative coefficient, so that every part is monotone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from jetflow_cluster.engine.cost_model import CostModel, StepShape

#: Rows at which the target's curve may bend.
ROW_KNOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
#: Rows at which the draft head's curve may bend.
DRAFT_KNOTS = (4, 8, 16, 32, 64, 128, 256, 512)
#: Weight of a change of slope.
_STIFFNESS = 0.5


def fit_costs(samples: Sequence[tuple[StepShape, float]], *, source: str = "measured") -> CostModel:
    """The model whose relative errors over the samples are least, in squares.

    Noise only ever adds to a measured time, so of samples of one shape the least counts.

    Args:
        samples: shapes and the seconds that a step of each took; at least one without drafting and prompts.
        source: kept in the model.

    Raises:
        ValueError: when there is no such sample.
    """
    least: dict[StepShape, float] = {}
    for shape, seconds in samples:
        least[shape] = min(seconds, least.get(shape, seconds))
    if not any(not s.num_draft_rows and not s.num_prompt_rows for s in least):
        raise ValueError("samples: at least one step without drafting and prompts is needed")
    row_knots = _knots(ROW_KNOTS, [s.num_rows for s in least])
    draft_knots = _knots(DRAFT_KNOTS, [s.num_draft_rows for s in least if s.num_draft_rows])
    plain = {s: t for s, t in least.items() if not s.num_prompt_rows}
    matrix = np.array([_features(s, row_knots, draft_knots) for s in plain])
    took = np.array(list(plain.values()))
    num_rows, num_draft = len(row_knots), len(draft_knots)
    bends = np.concatenate(
        (
            _bends(row_knots, 0, [(s.num_rows, t) for s, t in plain.items()], matrix.shape[1]),
            _bends(draft_knots, num_rows + 5, [(s.num_draft_rows, t) for s, t in plain.items()], matrix.shape[1]),
        )
    )
    wanted = np.concatenate((np.ones(len(took)), np.zeros(len(bends))))
    found = _non_negative(np.concatenate((matrix / took[:, None], bends)), wanted)
    rows, rest = np.cumsum(found[:num_rows]), found[num_rows:]
    draft = np.cumsum(rest[5 : 5 + num_draft]) if num_draft else np.zeros(1)
    model = CostModel(
        row_knots=row_knots,
        row_s=tuple(rows.tolist()),
        draft_knots=draft_knots or (1.0,),
        draft_s=tuple(draft.tolist()),
        request_s=float(rest[0]),
        context_s=float(rest[1]),
        tree_s=float(rest[2]),
        node_s=float(rest[3]),
        draft_context_s=float(rest[4]),
        source=source,
    )
    return _with_prompt_share(model, {s: t for s, t in least.items() if s.num_prompt_rows})


def _knots(offered: Sequence[int], seen: Sequence[int]) -> tuple[float, ...]:
    """Those of the offered knots that lie within what was seen, and the two ends of that."""
    if not seen:
        return ()
    low, high = min(seen), max(seen)
    return tuple(sorted({float(low), float(high)} | {float(k) for k in offered if low < k < high}))


def _bends(knots: Sequence[float], first: int, seen: Sequence[tuple[int, float]], num_columns: int) -> np.ndarray:
    """What a curve's changes of slope count for beside the samples, ``[len(knots) - 2, num_columns]``: as an error of
    as much of the time that a step with so many rows takes. One slow sample then bends little; many that agree do."""
    rows = np.zeros((max(0, len(knots) - 2), num_columns))
    for i, row in enumerate(rows):
        before, after = knots[i + 1] - knots[i], knots[i + 2] - knots[i + 1]
        _, took_s = min(seen, key=lambda one: abs(one[0] - knots[i + 1]))
        # The first column of a curve is its beginning, the others are its steps.
        row[first + i + 1] = _STIFFNESS * min(before, after) / before / took_s
        row[first + i + 2] = -_STIFFNESS * min(before, after) / after / took_s
    return rows


def _features(shape: StepShape, row_knots: Sequence[float], draft_knots: Sequence[float]) -> list[float]:
    """What each coefficient is multiplied by: the steps of the row curve, five rates, the steps of the draft curve."""
    num_nodes = shape.num_rows - shape.num_requests
    rates = [
        shape.num_requests,
        shape.num_context_tokens,
        float(num_nodes > 0),
        num_nodes,
        shape.num_draft_context_tokens,
    ]
    draft = [0.0] * len(draft_knots)
    if shape.num_draft_rows:
        draft = _ramps(shape.num_draft_rows, draft_knots)
    return [*_ramps(shape.num_rows, row_knots), *rates, *draft]


def _ramps(x: float, knots: Sequence[float]) -> list[float]:
    """1, then for each stretch between knots how far x has come along it, from 0 to 1."""
    return [1.0, *(min(max((x - a) / (b - a), 0.0), 1.0) for a, b in pairwise(knots))]


def _non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The non-negative x that minimises ``|matrix x - wanted|^2`` (Lawson and Hanson's active sets), with a trace of
    ridge that decides among coefficients which the samples cannot tell apart."""
    norms = np.sqrt((matrix**2).sum(0))
    norms[norms == 0] = 1.0
    unit = matrix / norms
    gram, right = unit.T @ unit + 1e-9 * np.eye(unit.shape[1]), unit.T @ wanted
    x, free = np.zeros(len(right)), np.zeros(len(right), bool)
    for _ in range(10 * len(right)):
        slope = np.where(free, -np.inf, right - gram @ x)
        if slope.max() <= 1e-10:
            break
        free[int(slope.argmax())] = True
        while True:
            tried = np.zeros_like(x)
            tried[free] = np.linalg.solve(gram[np.ix_(free, free)], right[free])
            below = free & (tried <= 0)
            if not below.any():
                break
            x += (x[below] / (x[below] - tried[below])).min() * (tried - x)
            free &= x > 1e-14
            x[~free] = 0.0
        x = tried
    return np.asarray(x / norms)


def _with_prompt_share(model: CostModel, samples: Mapping[StepShape, float]) -> CostModel:
    """The model with the share of a row at which prompt rows were measured; 1 where they were not."""
    if not samples:
        return model
    shares = np.linspace(0.05, 2.0, 118)
    errors = []
    for share in shares:
        tried = replace(model, prompt_share=float(share))
        errors.append(sum((tried.step_s(shape) / seconds - 1.0) ** 2 for shape, seconds in samples.items()))
    return replace(model, prompt_share=float(shares[int(np.argmin(errors))]))
