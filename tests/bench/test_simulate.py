"""Predicted curves: what must hold of them whatever the figures are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from jetflow_cluster.bench.load.published import SIZES, TASKS, Gpu, ServedModel, gpu_costs, lengths_of, most_requests
from jetflow_cluster.bench.load.simulate import MIN_GAIN, Placement, crossing, predict, step_s
from jetflow_cluster.bench.load.simulated_page import write_simulation
from jetflow_cluster.engine.cost_model import CostModel

LINEAR = CostModel(row_knots=(1, 2), row_s=(1.0, 2.0), draft_knots=(1.0, 2.0), draft_s=(0.1, 0.2))
FLAT = CostModel(row_knots=(1, 1000), row_s=(1.0, 1.0), draft_knots=(1,), draft_s=(0.5,))


@pytest.mark.parametrize("task", TASKS)
def test_lengths_grow_and_meet_the_published_ones(task: str) -> None:
    lengths = lengths_of(TASKS[task])
    assert list(lengths) == list(SIZES)
    assert lengths[1] == 1.0
    assert all(b >= a for a, b in pairwise(lengths.values()))
    assert all(length <= n for n, length in lengths.items())
    if task == "MT-Bench":
        assert (lengths[16], lengths[256]) == (pytest.approx(3.98), 5.94)


def test_free_rows_give_the_largest_tree_and_dear_rows_none() -> None:
    lengths = {1: 1.0, 4: 2.0, 8: 2.5}
    (free,) = predict(Placement(name="flat", cost=FLAT), lengths, (1,), context=0)
    assert (free.num_nodes, free.tokens_per_s) == (8, pytest.approx(2.5 / 1.5))
    (dear,) = predict(Placement(name="linear", cost=LINEAR), lengths, (4,), context=0)
    assert dear.num_nodes == 1
    assert dear.tokens_per_s == dear.off_tokens_per_s == pytest.approx(1.0)


def test_the_best_size_is_never_below_off_nor_below_a_fixed_one_that_pays() -> None:
    place = Placement(name="gpu", cost=gpu_costs(Gpu(), ServedModel(), 2))
    for point in predict(place, lengths_of((6,)), (1, 8, 64, 512)):
        assert point.tokens_per_s >= point.off_tokens_per_s
        assert point.tokens_per_s >= max(point.by_nodes.values()) / MIN_GAIN
        assert 1 <= point.num_nodes <= 256


def test_two_cohorts_where_both_halves_take_half() -> None:
    both = Placement(name="d", cost=LINEAR, num_draft_workers=1)
    slow = Placement(name="d", cost=FLAT, num_draft_workers=1)
    # Verifying 8 requests of 2 nodes takes 16, drafting 8 rows 0.8; in halves 8 and 0.4, one beside the other.
    assert step_s(both, 8, 2, 0, 1) == (pytest.approx(16.0), True)
    # In the memory-bound range half a batch takes as long as a whole one.
    assert step_s(slow, 8, 2, 0, 1) == (pytest.approx(1.5), False)


def test_crossings_are_the_first_load_without_gain() -> None:
    place = Placement(name="gpu", cost=gpu_costs(Gpu(), ServedModel(), 1))
    points = predict(place, lengths_of((6,)), (1, 8, 64, 512))
    best, fixed = crossing(points), crossing(points, 256)
    assert fixed is not None
    assert best is None or best >= fixed
    at = next(point for point in points if point.num_requests == fixed)
    assert at.by_nodes[256] < MIN_GAIN * at.off_tokens_per_s


def test_ranks_share_reading_and_pay_for_talking() -> None:
    gpu, model = Gpu(), ServedModel()
    one, four = (gpu_costs(gpu, model, size) for size in (1, 4))
    assert one.rows_s(1) / 4 < four.rows_s(1) < one.rows_s(1)
    assert four.rows_s(1) == pytest.approx(one.rows_s(1) / 4 + 72 * (gpu.all_reduce_s + 8192 / gpu.link_bytes_per_s))
    assert most_requests(gpu, model, 4, 1024, has_head=True) > 4 * most_requests(gpu, model, 1, 1024, has_head=True)


def test_requests_that_do_not_fit_are_left_out() -> None:
    place = Placement(name="small", cost=FLAT, max_requests=5)
    assert [p.num_requests for p in predict(place, {1: 1.0, 2: 1.5}, (1, 4, 8), context=0)] == [1, 4]


def test_the_page_states_that_nothing_was_measured(tmp_path: Path) -> None:
    results = write_simulation(tmp_path)
    page = (tmp_path / "simulated-qwen3-8b.md").read_text()
    assert "Nothing here was measured" in page
    assert "## Assumptions" in page
    for target in ("results/simulated/curves.png", "results/simulated/gains.png"):
        assert f"({target})" in page
        assert (tmp_path / target).stat().st_size > 10_000
    assert {row["num_gpus"] for row in results["rows"]} == {1, 2, 4}
    shipped = Path(__file__).parents[2] / "docs" / "simulated-qwen3-8b.md"
    assert shipped.read_text() == page
