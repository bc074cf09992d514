"""`jetflow bench step`: its bytes, its floors, and a run on tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jetflow_cluster.bench import step
from jetflow_cluster.bench.step import StepBenchConfig
from jetflow_cluster.bench.step_engine import STAGES
from jetflow_cluster.bench.step_floors import ModelBytes, Point
from jetflow_cluster.bench.step_shapes import SHAPES, Shape, random_models
from jetflow_cluster.cli import app
from support.pretend_gpu import pretended_gpu

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.6), ("qwen3-4b", 4.0), ("qwen3-8b", 8.2), ("qwen3-14b", 14.8), ("qwen3-32b", 32.8)],
)
def test_named_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    sizes = ModelBytes.of(Shape.of(name), torch.bfloat16, CUDA)
    ends = sizes.lm_head * (1 if Shape.of(name).target.tie_word_embeddings else 2)
    assert (sizes.target + ends) / 2 / 1e9 == pytest.approx(billions, rel=0.02)


def test_the_published_head_and_caches() -> None:
    sizes = ModelBytes.of(Shape.of("qwen3-8b"), torch.bfloat16, CUDA)
    assert sizes.head / 2 / 1e9 == pytest.approx(1.05, rel=0.01)
    assert (sizes.target_kv, sizes.draft_kv) == (144 * 1024, 20 * 1024)
    assert Shape.of("qwen3-8b").head.target_layer_ids == (1, 9, 17, 25, 33)


@pytest.mark.parametrize("name", SHAPES)
def test_floors_are_the_sum_of_what_is_read(name: str) -> None:
    sizes = ModelBytes.of(Shape.of(name), torch.bfloat16, CUDA)
    tree = Point(batch_size=3, num_nodes=17, prefix_len=129)
    single = Point(batch_size=3, num_nodes=1, prefix_len=129)
    context = 3 * 129
    alone = sizes.target + sizes.lm_head + context * sizes.target_kv
    assert sizes.step(single) == alone
    assert sizes.step(tree) == alone + sizes.head + sizes.lm_head + context * sizes.draft_kv
    parts = sizes.stages(tree)
    assert parts["attention"] + parts["GEMMs"] + parts["lm_head"] == parts["verify"]


def test_bytes_are_those_of_real_weights() -> None:
    shape = Shape.of("tiny")
    target, head = random_models(shape, torch.float32, CPU)
    sizes = ModelBytes.of(shape, torch.float32, CPU)

    def bytes_of(module: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    assert sizes.head == bytes_of(head)
    assert sizes.lm_head == bytes_of(target.lm_head)
    assert sizes.target == bytes_of(target) - bytes_of(target.lm_head) - bytes_of(target.embedding)
    assert all(p.isfinite().all() for model in (target, head) for p in model.parameters())


def test_a_run_on_tiny_shapes(tmp_path: Path) -> None:
    given = ["--shape", "tiny", "--batch-sizes", "1,3", "--num-nodes", "1,9", "--prefix-lens", "40", "--repeats", "2"]
    done = CliRunner().invoke(app, ["bench", "step", "--output", str(tmp_path), "--device", "cpu", *given])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert results["skipped"] == []
    assert results["settings"]["bandwidth_bytes_per_s"] > 1e7
    parts = {"attention", "GEMMs", "lm_head", "attention by SDPA"}
    for batch in (1, 3):
        for nodes in (1, 9):
            of = {r["stage"]: r for r in results["rows"] if (r["batch_size"], r["num_nodes"]) == (batch, nodes)}
            wanted = {*STAGES, "step", *parts} | ({"head"} if nodes > 1 else set())
            assert of.keys() == (wanted if nodes > 1 else wanted - {"draft"})
            for row in of.values():
                assert row["time_us"] > 0
                if row["num_bytes"]:
                    assert row["ratio_to_floor"] == pytest.approx(row["time_us"] / row["floor_us"])


def test_steps_of_a_gpu_are_timed_from_graphs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"shape": "tiny", "dtype": torch.float64, "batch_sizes": (2,), "num_nodes": (1, 9), "prefix_lens": (40,)}
    monkeypatch.setitem(step._COPY_BYTES, "cuda", 2**20)
    with pretended_gpu(monkeypatch) as gpu:
        config = StepBenchConfig(output_dir=tmp_path, device=CUDA, repeats=1, **given)
        results = step.run_step_bench(config, Console())
    assert results["skipped"] == [] and gpu.launches["build_tree.lay_out_rows_triton"] > 0
    for nodes in (1, 9):
        of = {row["stage"] for row in results["rows"] if row["num_nodes"] == nodes}
        assert of >= {*STAGES, "step", "step from graphs", "attention by FlexAttention"} - {"draft"}


def test_floors_alone_allocate_nothing(tmp_path: Path) -> None:
    given = ["--shape", "qwen3-32b", "--floor-only", "--bandwidth-gbps", "4000", "--batch-sizes", "64"]
    done = CliRunner().invoke(app, ["bench", "step", "--output", str(tmp_path), "--device", "cuda", *given])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    steps = [row for row in rows if row["stage"] == "step"]
    assert len(steps) == 3
    for row in rows:
        assert row["time_us"] is None
        assert row["floor_us"] == pytest.approx(row["num_bytes"] / 4e12 * 1e6)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"shape": "qwen9"}, "shape = 'qwen9'"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"num_nodes": (513,)}, "at most 512"),
        ({"repeats": 0}, "repeats"),
        ({"floor_only": True}, "bandwidth"),
        ({"bandwidth": 0.0}, "bandwidth = 0.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, given: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Shape.of(StepBenchConfig(output_dir=tmp_path, device=CPU, **given).shape)
