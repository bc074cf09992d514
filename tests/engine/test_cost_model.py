"""The cost of a step: monotone, additive, the same after JSON, and found again from its own figures."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetflow_cluster.engine.cost_fit import fit_costs
from jetflow_cluster.engine.cost_model import COST_UNIT_S, PARTS, CostModel, StepShape

MODEL = CostModel(
    row_knots=(1, 8, 64, 256),
    row_s=(2e-3, 2.2e-3, 6e-3, 20e-3),
    draft_knots=(8, 64),
    draft_s=(0.5e-3, 1.5e-3),
    request_s=20e-6,
    context_s=1e-7,
    tree_s=1e-4,
    node_s=5e-6,
    draft_context_s=2e-8,
    prompt_share=0.75,
)
FIELDS = ("num_rows", "num_context_tokens", "num_draft_rows", "num_draft_context_tokens", "num_prompt_rows")


@st.composite
def shapes(draw: st.DrawFn) -> StepShape:
    requests = draw(st.integers(1, 64))
    return StepShape(
        num_requests=requests,
        num_rows=requests + draw(st.integers(0, 400)),
        num_context_tokens=draw(st.integers(0, 50_000)),
        num_draft_rows=draw(st.sampled_from((0, 8, 100, 512))),
        num_draft_context_tokens=draw(st.integers(0, 9000)),
        num_prompt_rows=draw(st.integers(0, 300)),
    )


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), name=st.sampled_from(FIELDS), more=st.integers(1, 200))
def test_more_never_costs_less(shape: StepShape, name: str, more: int) -> None:
    larger = replace(shape, **{name: getattr(shape, name) + more})
    assert MODEL.step_s(larger) >= MODEL.step_s(shape) - 1e-12
    assert MODEL.step_s(shape) == pytest.approx(sum(MODEL.parts(shape)))


def test_a_price_list_is_the_cost_of_the_whole_step() -> None:
    shape = StepShape(num_requests=8, num_context_tokens=900, num_draft_rows=64, num_draft_context_tokens=900)
    costs = MODEL.row_costs(shape, 200)
    assert costs.dtype == np.int64 and (np.diff(costs) >= 0).all() and costs.min() >= 1
    for rows in (8, 9, 40, 200):
        assert costs[rows] * COST_UNIT_S == pytest.approx(MODEL.step_s(replace(shape, num_rows=rows)), abs=1e-6)
    assert (costs[:8] == costs[8]).all()


def test_prompt_rows_make_rows_dearer_and_are_not_paid_for_by_trees() -> None:
    alone = StepShape(num_requests=4)
    beside = replace(alone, num_prompt_rows=100)
    plain, crowded = (MODEL.row_costs(shape, 60) for shape in (alone, beside))
    assert plain[4] == crowded[4]
    assert crowded[60] - crowded[5] > plain[60] - plain[5]


def test_json_gives_the_same_model() -> None:
    assert CostModel.from_json(MODEL.to_json()) == MODEL


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"row_s": (2e-3, 1e-3, 6e-3, 20e-3)}, "row_s"),
        ({"row_knots": (1, 8, 8, 9)}, "row_knots"),
        ({"row_s": (1.0,)}, "must agree"),
        ({"node_s": -1.0}, "node_s = -1.0"),
        ({"nodes_s": 1.0}, "unknown fields \\['nodes_s'\\]"),
    ],
    ids=["falling", "knots", "lengths", "negative", "unknown"],
)
def test_what_is_no_model_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CostModel.from_dict(MODEL.to_dict() | change)


def test_scales_multiply_parts() -> None:
    shape = StepShape(num_requests=4, num_rows=50, num_context_tokens=999, num_draft_rows=32, num_prompt_rows=0)
    scales = (1.5, 2.0, 0.5, 3.0, 0.7, 0.25, 1.0)
    expected = [p * s for p, s in zip(MODEL.parts(shape), scales, strict=True)]
    assert MODEL.scaled(scales).parts(shape) == pytest.approx(expected)
    assert len(PARTS) == len(expected)


@pytest.mark.parametrize("noise", [0.0, 0.6], ids=["exact", "noisy"])
def test_a_fit_finds_the_costs_again(noise: float) -> None:
    rng = random.Random(5)
    samples = []
    for requests in (1, 2, 4, 8, 16, 32):
        for nodes in (0, 1, 3, 7, 15, 31):
            for context in (64, 200):
                shape = StepShape(
                    num_requests=requests,
                    num_rows=requests * (nodes + 1),
                    num_context_tokens=requests * context,
                    num_draft_rows=8 * requests if nodes else 0,
                    num_draft_context_tokens=requests * context if nodes else 0,
                )
                # Noise only adds, and now and then there is none.
                times = [MODEL.step_s(shape) * (1 + rng.choice((0.0, noise * rng.random()))) for _ in range(7)]
                samples += [(shape, seconds) for seconds in times]
    prompts = StepShape(num_requests=1, num_rows=1, num_prompt_rows=128)
    samples.append((prompts, MODEL.step_s(prompts)))
    model = fit_costs(samples)
    for requests, nodes, context in ((3, 0, 100), (8, 8, 120), (20, 4, 70), (64, 1, 100)):
        shape = StepShape(
            num_requests=requests,
            num_rows=requests * (nodes + 1),
            num_context_tokens=requests * context,
            num_draft_rows=8 * requests if nodes else 0,
            num_draft_context_tokens=requests * context if nodes else 0,
        )
        assert model.step_s(shape) == pytest.approx(MODEL.step_s(shape), rel=0.12)
    assert model.prompt_share == pytest.approx(0.75, abs=0.15)


def test_a_fit_needs_plain_steps() -> None:
    with pytest.raises(ValueError, match="without drafting"):
        fit_costs([(StepShape(num_requests=1, num_rows=4, num_draft_rows=8), 1.0)])
