"""Whether to draft, for how many requests, how deep: before any score is known, from expected gains and costs.

Drafting m of R requests, d tokens deep and with k nodes each, is expected to give

    ``(R + sum over the m best of worth * gain[k, d]) / cost(R + m (k - 1) rows, m (d + 1) rows of the head)``

tokens per second; the best of all (m, k, d) is taken and compared with ``R / cost(R)``. Which nodes are then verified
is decided by the scores and the price (`jetflow_cluster.tree.build`). Where drafters are elsewhere and all requests
draft, two cohorts are weighed too: each of two steps takes the longer of one half's pass and the other half's drafting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.tree.lookup import LONE_MATCH, MATCH_BOUNDS, MATCH_GAINS, MAX_LOOKUP_DEPTH

#: Tree sizes that are weighed, roots included.
NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
#: Accepted tokens that a good head reaches with each of them: what a probe hopes for.
HOPED = tuple(0.6 * np.log2(n) for n in NODES)

#: What guesses from a request's own text must be worth over what they cost. Where no head guesses the load is high, and
#: rows of trees cost more there than warm-up foretells.
_LOOKUP_MARGIN = 2.0
#: What drafting for a part of the requests must promise over drafting for all, and is thought to promise too much: the
#: worthiest are so by luck too.
_PART_MARGIN = 1.1


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Accepted tokens of one request by tree size and depth."""

    #: float64 ``[len(NODES), D]``, column d - 1 for trees at most d deep; the last column for trees of any depth.
    accepted: np.ndarray
    #: Factor of requests that sample.
    sampled_share: float = 0.6
    #: Those of the largest trees where the head alone guesses; None where nothing guesses beside it.
    of_head: float | None = None

    @property
    def most_of_head(self) -> float:
        """What the head alone reaches."""
        return float(self.accepted.max()) if self.of_head is None else self.of_head

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; `from_dict` gives equal ones."""
        return {"accepted": self.accepted.tolist(), "sampled_share": self.sampled_share, "of_head": self.of_head}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Gains:
        """Raises ValueError or TypeError for what is none."""
        fields = dict(values)
        accepted = np.array(fields.pop("accepted", ()), np.float64)
        if accepted.ndim != 2 or len(accepted) != len(NODES) or not np.isfinite(accepted).all():
            raise ValueError(f"accepted: a row for each of {len(NODES)} tree sizes is needed")
        return cls(accepted=accepted, **fields)

    def hoped(self) -> Gains:
        """At least what a good head reaches."""
        depths = np.arange(1, self.accepted.shape[1] + 1)
        hoped = np.minimum(np.array(HOPED)[:, None], 0.8 * depths)
        return Gains(accepted=np.maximum(self.accepted, hoped), sampled_share=max(self.sampled_share, 0.6))


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The load of a step, as far as the choice depends on it."""

    #: Requests that decode, and the tokens of their prefixes together.
    num_requests: int
    num_context_tokens: int
    #: Rows beneath the trees: prompts.
    num_prompt_rows: int
    #: Most nodes of one tree.
    max_nodes: int
    #: Slots of the head's block, where it cannot be cut shorter; None where it can.
    num_block_slots: int | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to draft."""

    #: Requests that draft, the worthiest first; 0 is none.
    num_drafted: int
    #: Nodes of a tree, and its depth.
    num_nodes: int
    depth: int
    #: Expected tokens per second over those of not drafting.
    ratio: float
    #: Expected tokens per second.
    tokens_per_s: float
    #: 2 where one half is to be drafted while the other is verified.
    num_cohorts: int = 1


def choose(
    cost: CostModel,
    gains: Gains,
    worths: np.ndarray,
    situation: Situation,
    *,
    only_all: bool = False,
    cohort_share: float = 0.0,
) -> Choice:
    """The best of all members of the choice.

    Args:
        cost: of a step.
        gains: of a request of worth 1.
        worths: of the requests that may draft, falling, float64 ``[A]``.
        situation: the rest of the load.
        only_all: weigh drafting for all of them or none.
        cohort_share: share of what two cohorts promise that counts; 0 where there can be but one.
    """
    num = situation.num_requests
    accepted = gains.accepted
    sizes = np.array([n for n in NODES if n <= situation.max_nodes] or [2])
    depths = np.arange(1, accepted.shape[1] + 1)
    counts = np.array([len(worths)]) if only_all else _counts(len(worths))
    gain = np.cumsum(worths)[counts - 1][:, None, None] * accepted[None, : len(sizes)]
    # Shape [m, k, 1], and [m, 1, d] for the head.
    nodes = (counts[:, None] * (sizes - 1))[:, :, None]
    slots = depths + 1 if situation.num_block_slots is None else np.full(len(depths), situation.num_block_slots)
    beneath = num + cost.prompt_share * situation.num_prompt_rows
    mean_context = situation.num_context_tokens / max(num, 1)
    plain_s = cost.plain_s(num, situation.num_context_tokens)
    trees_s = cost.trees_s(beneath, nodes)
    head_s = cost.drafting_s(counts[:, None] * slots, counts[:, None] * mean_context)[:, None, :]
    rates = (num + gain) / (plain_s + trees_s + head_s)
    rates[counts < len(worths)] /= _PART_MARGIN
    num_cohorts = 1
    if cohort_share and num == len(worths) > 1:
        half_s = cost.plain_s(num / 2, situation.num_context_tokens / 2)
        half_s = half_s + cost.trees_s(beneath - num / 2, nodes[-1:] / 2)
        half_head_s = cost.drafting_s(counts[-1:, None] * slots / 2, num / 2 * mean_context)[:, None, :]
        in_two = cohort_share * (num + gain[-1:]) / (2.0 * np.maximum(half_s, half_head_s))
        if in_two.max() > rates.max():
            rates, counts, num_cohorts = in_two, counts[-1:], 2
    m, k, d = np.unravel_index(int(rates.argmax()), rates.shape)
    return Choice(
        num_cohorts=num_cohorts,
        num_drafted=int(counts[m]),
        num_nodes=int(sizes[k]),
        depth=int(depths[d]),
        ratio=float(rates[m, k, d] * plain_s / max(num, 1)),
        tokens_per_s=float(rates[m, k, d]),
    )


def paying_match(cost: CostModel, situation: Situation) -> int | None:
    """The shortest match of a request's own text of which some first guesses, alone in the step, are worth more than
    they cost; None where there is none."""
    num, depths = situation.num_requests, np.arange(1, MAX_LOOKUP_DEPTH + 1)
    plain_s = cost.plain_s(num, situation.num_context_tokens)
    beneath = num + cost.prompt_share * situation.num_prompt_rows
    trees_s = cost.trees_s(beneath, depths)
    pays = (MATCH_GAINS * plain_s / max(num, 1) >= _LOOKUP_MARGIN * trees_s).any(1)
    return max(MATCH_BOUNDS[int(pays.argmax())], LONE_MATCH) if pays.any() else None


def _counts(num: int) -> np.ndarray:
    """1, 2, 4 and so on, and all."""
    return np.unique([*(2**i for i in range(num.bit_length())), num])


def num_cohorts(cost: CostModel, *, num_requests: int, num_nodes: int, depth: int, num_context_tokens: int) -> int:
    """How many cohorts of requests should be in flight with dedicated draft workers: 2 where one half may be drafted
    while the other is verified and that is measured to be faster, ``2 max(Tv(B/2), Td(B/2)) < Tv(B) + Td(B)``. In the
    memory-bound range, where half a batch takes nearly as long as a whole one, it is not.
    """

    def times(num: float) -> tuple[float, float]:
        context = num_context_tokens * num / max(num_requests, 1)
        verify = float(cost.rows_s(num) + cost.trees_s(num, num * (num_nodes - 1)))
        verify += cost.request_s * num + cost.context_s * context
        return verify, float(cost.drafting_s(num * (depth + 1), context))

    if num_requests < 2:
        return 1
    return 2 if 2 * max(times(num_requests / 2)) < sum(times(num_requests)) else 1
