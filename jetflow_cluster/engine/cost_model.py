"""What a step costs: seconds as a function of its rows, requests, prefixes, and what is drafted.

A pure function of a `StepShape`, a sum of parts that are each non-negative and non-decreasing in what they are named
after::

    rows      a monotone piecewise-linear curve over the target's rows, the fixed cost of a step included, where each
              decoding request has one
    requests  per decoding request: choosing, bookkeeping, telling
    context   per token of the prefixes that decoding requests attend to
    trees     once where the step has trees at all
    nodes     what guessed nodes add to the curve of rows, times `tree_scale`, and per guessed node: building, walking,
              committing
    draft     a monotone piecewise-linear curve over the draft head's rows, and per token of its contexts
    prompts   what prompt rows add to the curve of rows: they move the step along it by `prompt_share` of a row each

The parts are what is fitted at warm-up (`jetflow_cluster.engine.cost_fit`) and scaled while running.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np

#: Parts of a step's cost, in the order of `CostModel.parts`.
PARTS = ("rows", "requests", "context", "trees", "nodes", "draft", "prompts")
#: Seconds per unit of `CostModel.row_costs`.
COST_UNIT_S = 1e-7


class _Curve:
    """Linear between knots; level below the first one, the last slope behind the last one.

    Numbers are looked up without NumPy: curves are read at single points several times in each step.
    """

    def __init__(self, x: tuple[float, ...], y: tuple[float, ...]):
        self._x, self._y = x, y
        self._slopes = tuple((d - c) / (b - a) for (a, b), (c, d) in zip(pairwise(x), pairwise(y), strict=True))

    def at(self, x: float | np.ndarray) -> Any:
        """A number, or float64 of the argument's shape."""
        if isinstance(x, np.ndarray):
            found = np.interp(x, self._x, self._y)
            if self._slopes and np.max(x) > self._x[-1]:
                found = found + self._slopes[-1] * np.maximum(x - self._x[-1], 0.0)
            return found
        place = min(bisect_right(self._x, x), len(self._slopes)) - 1
        return self._y[place] + self._slopes[place] * (x - self._x[place]) if place >= 0 else self._y[0]


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What decides the cost of one step."""

    #: Requests that decode.
    num_requests: int = 0
    #: Rows of all their trees, roots included; at least `num_requests`.
    num_rows: int = 0
    #: Sum of the decoding requests' prefixes, in tokens.
    num_context_tokens: int = 0
    #: Rows of the draft head: requests that it guesses for, times the slots of a block; 0 where nothing is drafted.
    num_draft_rows: int = 0
    #: Sum of the draft contexts that these blocks attend to, in tokens.
    num_draft_context_tokens: int = 0
    #: Prompt tokens that are computed in the same step.
    num_prompt_rows: int = 0
    #: The head's pass runs elsewhere beside the target's, and the longer of both counts.
    is_overlapped: bool = False


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """See the module. Raises ValueError for a curve that is none or a negative part."""

    #: Rows of the target at the knots of its curve, increasing.
    row_knots: tuple[float, ...]
    #: Seconds at these knots, non-decreasing; behind the last one the last slope goes on.
    row_s: tuple[float, ...]
    #: Rows of the draft head at the knots of its curve, increasing; what lies below the first costs as much as it.
    draft_knots: tuple[float, ...] = (1.0,)
    #: Seconds at these knots, non-decreasing.
    draft_s: tuple[float, ...] = (0.0,)
    #: Seconds per decoding request.
    request_s: float = 0.0
    #: Seconds per token of the decoding requests' prefixes.
    context_s: float = 0.0
    #: Seconds once where some tree has more than its root.
    tree_s: float = 0.0
    #: Seconds per guessed node, beside its row.
    node_s: float = 0.0
    #: Seconds per token of the draft contexts.
    draft_context_s: float = 0.0
    #: Rows of the curve that one prompt row is worth.
    prompt_share: float = 1.0
    #: Factor of what guessed nodes add to the curve of rows.
    tree_scale: float = 1.0
    #: Where the figures come from, in words.
    source: str = "measured"
    _row_curve: _Curve = field(init=False, repr=False, compare=False)
    _draft_curve: _Curve = field(init=False, repr=False, compare=False)
    #: What whole numbers of rows cost where no prompt lies beneath, as far as it was asked for.
    _ramp: np.ndarray = field(init=False, repr=False, compare=False)
    #: The last price list, and what it was made for: the shape of many steps is that of the one before.
    _listed: tuple[tuple[StepShape, int] | None, np.ndarray] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("row", "draft"):
            knots, seconds = (tuple(map(float, getattr(self, f"{name}_{part}"))) for part in ("knots", "s"))
            object.__setattr__(self, f"{name}_knots", knots)
            object.__setattr__(self, f"{name}_s", seconds)
            if not knots or len(knots) != len(seconds):
                raise ValueError(f"{name}_knots and {name}_s have {len(knots)} and {len(seconds)} entries: must agree")
            if any(b <= a for a, b in pairwise(knots)):
                raise ValueError(f"{name}_knots = {knots}: must increase")
            if seconds[0] < 0 or any(b < a for a, b in pairwise(seconds)):
                raise ValueError(f"{name}_s = {seconds}: must be non-negative and non-decreasing")
            object.__setattr__(self, f"_{name}_curve", _Curve(knots, seconds))
        object.__setattr__(self, "_ramp", np.empty(0))
        object.__setattr__(self, "_listed", (None, np.empty(0)))
        for name in ("request_s", "context_s", "tree_s", "node_s", "draft_context_s", "prompt_share", "tree_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")

    def step_s(self, shape: StepShape) -> float:
        """Seconds of a whole step."""
        return float(sum(self.parts(shape)))

    def parts(self, shape: StepShape) -> tuple[float, ...]:
        """Seconds by part, in the order of `PARTS`."""
        num_nodes = shape.num_rows - shape.num_requests
        parts = (
            float(self.rows_s(shape.num_requests)),
            self.request_s * shape.num_requests,
            self.context_s * shape.num_context_tokens,
            self.tree_s if num_nodes > 0 else 0.0,
            float(self.nodes_s(shape.num_requests, num_nodes)) if num_nodes > 0 else 0.0,
            self.drafting_s(shape.num_draft_rows, shape.num_draft_context_tokens),
            self.prompts_s(shape.num_rows, shape.num_prompt_rows),
        )
        if not shape.is_overlapped:
            return parts
        draft = PARTS.index("draft")
        exposed_s = max(0.0, 2 * parts[draft] - sum(parts))
        return (*parts[:draft], exposed_s, *parts[draft + 1 :])

    def plain_s(self, num_requests: float, num_context_tokens: float) -> float:
        """Seconds of a step in which so many requests decode and nothing is guessed."""
        seconds = self.rows_s(num_requests) + self.request_s * num_requests + self.context_s * num_context_tokens
        return float(seconds)

    def prompts_s(self, num_rows: float, num_prompt_rows: float) -> float:
        """Seconds that prompt rows add to a step with so many others."""
        return float(self.rows_s(num_rows + self.prompt_share * num_prompt_rows) - self.rows_s(num_rows))

    def trees_s(self, beneath: float, num_nodes: Any) -> Any:
        """Seconds of trees with guessed nodes, at least one, over so many other rows; a number or an array by
        `num_nodes`."""
        return self.tree_s + self.nodes_s(beneath, num_nodes)

    def nodes_s(self, beneath: float, num_nodes: Any) -> Any:
        """The part of `trees_s` that grows with them."""
        grown = self.rows_s(beneath + num_nodes) - self.rows_s(beneath)
        return self.tree_scale * grown + self.node_s * num_nodes

    def rows_s(self, num_rows: float | np.ndarray) -> Any:
        """Seconds of the target's pass by rows; a number, or float64 of the argument's shape."""
        return self._row_curve.at(num_rows)

    def drafting_s(self, num_draft_rows: float | np.ndarray, num_context_tokens: float | np.ndarray = 0.0) -> Any:
        """Seconds of the head's pass by its rows; 0 for no rows."""
        seconds = self._draft_curve.at(num_draft_rows) + self.draft_context_s * num_context_tokens
        if isinstance(num_draft_rows, np.ndarray):
            return np.where(num_draft_rows > 0, seconds, 0.0)
        return seconds if num_draft_rows > 0 else 0.0

    def row_costs(self, shape: StepShape, max_rows: int) -> np.ndarray:
        """The price list of a step's trees: what the whole step costs with n tree rows.

        Prompt rows, and rows of trees that are outside of the choice, lie beneath: they make each further row as dear
        as it is there, but their own cost is not the trees' (`shape.num_prompt_rows`).

        Args:
            shape: of the step; its `num_rows` is not read.
            max_rows: largest n.

        Returns:
            int64 ``[max_rows + 1]`` in units of 100 ns, at least 1 and non-decreasing; entries below
            `shape.num_requests` are that entry's. Not to be written to.
        """
        if self._listed[0] != (shape, max_rows):
            object.__setattr__(self, "_listed", ((shape, max_rows), self._price_list(shape, max_rows)))
        return self._listed[1]

    def _price_list(self, shape: StepShape, max_rows: int) -> np.ndarray:
        least, beneath = shape.num_requests, self.prompt_share * shape.num_prompt_rows
        seconds = self.plain_s(least, shape.num_context_tokens)
        draft_s = self.drafting_s(shape.num_draft_rows, shape.num_draft_context_tokens)
        seconds += 0.0 if shape.is_overlapped else draft_s
        ramp = self._whole_rows(max_rows) if not beneath else self._rows_over(beneath, max_rows)
        costs = ramp + (seconds + self.tree_s - ramp[min(least, max_rows)])
        costs[: least + 1] = seconds
        if shape.is_overlapped:
            costs = np.maximum(costs, draft_s)
        units = np.maximum(np.rint(costs / COST_UNIT_S), 1.0).astype(np.int64)
        return np.maximum.accumulate(units)

    def _whole_rows(self, max_rows: int) -> np.ndarray:
        if len(self._ramp) <= max_rows:
            object.__setattr__(self, "_ramp", self._rows_over(0.0, 2 * max_rows))
        return self._ramp[: max_rows + 1]

    def _rows_over(self, beneath: float, max_rows: int) -> np.ndarray:
        """What 0 to `max_rows` rows of trees add over others, and a constant that is not theirs."""
        rows = np.arange(max_rows + 1, dtype=np.float64)
        return np.asarray(self.tree_scale * self.rows_s(rows + beneath) + self.node_s * rows)

    def scaled(self, scales: Sequence[float]) -> CostModel:
        """The model with each part multiplied, in the order of `PARTS`; the part of prompts by its share of a row.

        Raises:
            ValueError: not one scale per part, or a negative one.
        """
        if len(scales) != len(PARTS) or min(scales) < 0:
            raise ValueError(f"scales = {tuple(scales)}: must be {len(PARTS)} numbers of at least 0")
        rows, requests, context, trees, nodes, draft, prompts = map(float, scales)
        return CostModel(
            row_knots=self.row_knots,
            row_s=tuple(s * rows for s in self.row_s),
            draft_knots=self.draft_knots,
            draft_s=tuple(s * draft for s in self.draft_s),
            request_s=self.request_s * requests,
            context_s=self.context_s * context,
            tree_s=self.tree_s * trees,
            node_s=self.node_s * nodes,
            draft_context_s=self.draft_context_s * draft,
            prompt_share=self.prompt_share * prompts / rows if rows else 0.0,
            tree_scale=self.tree_scale * nodes / rows if rows else 0.0,
            source=self.source,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; `from_dict` gives an equal model."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal model."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Raises ValueError for text that is no model, naming what is wrong."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostModel:
        """Raises ValueError for unknown and missing fields, and as the constructor does."""
        known = {one.name for one in fields(cls) if one.init}
        unknown, missing = set(values) - known, {"row_knots", "row_s"} - set(values)
        if unknown or missing:
            raise ValueError(f"cost model: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
        numbers: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()}
        return cls(**numbers)
