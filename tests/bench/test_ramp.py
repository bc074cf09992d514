"""The ramp: its profile and verdict, and the engine's scheduler and policy on a virtual clock."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jetflow_cluster.bench.load.ramp import RampProfile, RampRun, StepSeen, judge, run_ramp
from jetflow_cluster.bench.load.ramp_bench import RampBenchConfig, run_ramp_bench
from jetflow_cluster.bench.load.virtual_engine import Guesser, GuessProfile, RampRequests, VirtualEngine
from jetflow_cluster.console import stderr
from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.tree.build import build_trees
from jetflow_cluster.types import SpeculationMode

AUTO, OFF = SpeculationMode.AUTO, SpeculationMode.OFF
#: Rows are cheap up to 16 of them, and dear behind; a small processor's shape.
COST = CostModel(
    row_knots=(1, 16, 128, 512),
    row_s=(0.004, 0.006, 0.05, 0.2),
    draft_knots=(1, 64, 512),
    draft_s=(0.0008, 0.003, 0.02),
    request_s=5e-5,
    tree_s=3e-4,
)
SHORT = RampProfile(levels=(1, 8, 48), level_s=2.0)
REQUESTS = RampRequests(num_prompt_tokens=16, min_output=24, max_output=48)


def test_the_profile_goes_up_and_down() -> None:
    profile = RampProfile(levels=(1, 4, 9), level_s=2.0)
    assert profile.steps == (1, 4, 9, 4, 1)
    assert profile.seconds == 10.0
    assert [profile.at(t) for t in (0.0, 1.9, 2.0, 5.0, 7.0, 9.9, 99.0)] == [1, 1, 4, 9, 4, 1, 1]


@pytest.mark.parametrize("levels", [(), (0, 1), (2, 2), (3, 1)])
def test_profiles_that_cannot_be_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="levels = "):
        RampProfile(levels=levels)


def _run(profile: RampProfile, seen: list[tuple[float, int, int, float]]) -> RampRun:
    """Steps of one second with 4 requests: their end, tokens, rows, and what they would have taken without trees."""
    steps = [
        StepSeen(ended_s=end, num_tokens=tokens, num_decoding=4, num_rows=rows, took_s=1.0, off_s=off_s)
        for end, tokens, rows, off_s in seen
    ]
    return RampRun(profile=profile, steps=steps)


@pytest.mark.parametrize(
    ("rows", "off_s", "worst", "turns", "holds"),
    [
        pytest.param([16, 16, 4, 4, 16, 16], [1.4] * 6, 1.4, 2, True, id="across-and-back"),
        pytest.param([16, 4, 16, 4, 16, 4], [1.4] * 6, 1.4, 5, False, id="oscillates"),
        pytest.param([16, 5, 16, 5, 16, 5], [1.4] * 6, 1.4, 0, True, id="small-trees-are-no-turn"),
        pytest.param([16] * 6, [1.4, 1.4, 0.85, 1.4, 1.4, 1.4], 0.85, 0, False, id="dips"),
    ],
)
def test_the_verdict(rows: list[int], off_s: list[float], worst: float, turns: int, holds: bool) -> None:
    profile = RampProfile(levels=(1, 2), level_s=2.0)
    seen = [(i + 0.5, 8, r, s) for i, (r, s) in enumerate(zip(rows, off_s, strict=True))]
    verdict = judge(_run(profile, seen), _run(profile, [(i + 0.5, 4, 4, 1.0) for i in range(6)]), window_s=1.0)
    assert verdict.worst_ratio == pytest.approx(worst)
    assert verdict.worst_apart == 2.0
    assert (verdict.num_turns, verdict.holds) == (turns, holds)


def test_guesses_are_right_as_often_as_they_say() -> None:
    guesser = Guesser(GuessProfile(depth=3, width=4), seed=1)
    said = right = 0.0
    for _ in range(1500):
        table = guesser.table()
        (tree,) = build_trees([table], [0], max_nodes=[6], max_depths=[3])
        said += sum(np.exp(score / 65536) for score in tree.scores[1:])
        path = guesser.walk(tree, table)
        right += path.num_accepted
        assert len(path.token_ids) == len(path.nodes)
        assert [tree.token_ids[node] for node in path.nodes[1:]] == path.token_ids[:-1]
    assert right == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("mode", [AUTO, OFF])
def test_a_virtual_engine_serves_what_it_was_asked_and_leaks_no_page(mode: SpeculationMode) -> None:
    engine = VirtualEngine(mode, COST, requests=REQUESTS, noise=0.0, max_num_requests=8, seed=3)
    for _ in range(20):
        engine.add()
    total, before_s = 0, 0.0
    while engine.num_active:
        step = engine.step()
        assert step.ended_s == pytest.approx(before_s + step.took_s)
        before_s, total = step.ended_s, total + step.num_tokens
        if mode is OFF:
            assert step.num_rows == step.num_decoding
            assert step.off_s == pytest.approx(step.took_s)
    assert 20 * REQUESTS.min_output <= total <= 20 * REQUESTS.max_output
    assert (engine.pool.num_free, engine.pool.num_used) == (engine.pool.num_pages, 0)


def test_speculation_follows_the_load() -> None:
    auto, off = (
        run_ramp(VirtualEngine(mode, COST, requests=REQUESTS, max_num_requests=48), SHORT) for mode in (AUTO, OFF)
    )
    verdict = judge(auto, off)
    busiest = len(verdict.nodes) // 2
    assert verdict.ratios[0] > 1.2 and verdict.nodes[0] > 3
    assert verdict.nodes[busiest] < 1.5
    assert verdict.worst_ratio > 0.85
    assert verdict.auto[0] > 1.1 * verdict.off[0]


def test_the_bench_writes_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(COST.to_json())
    config = RampBenchConfig(
        output_dir=tmp_path,
        profile=dataclasses.replace(SHORT, levels=(1, 8)),
        requests=REQUESTS,
        costs=tmp_path / "costs.json",
        seeds=(0,),
    )
    results = run_ramp_bench(config, stderr)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    (row,) = results["rows"]
    assert len(row["ratios"]) == 3
    assert row["worst_ratio_to_off"] == min(row["ratios"])
    assert (tmp_path / "ramp.png").stat().st_size > 5_000
