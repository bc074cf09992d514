from __future__ import annotations

import json
from pathlib import Path

import pytest

from jetflow_cluster.bench.report import draw_offline, rows_table, write_json
from jetflow_cluster.bench.rows import Measurement, Run, make_rows


def measure(
    seconds: dict[str, float], *, tokens: dict[str, list[int]] | None = None, batch_size: int = 1
) -> list[Measurement]:
    runs = {
        system: Run(
            seconds=s, token_ids=[(tokens or {}).get(system, [1, 2, 3, 4])] * batch_size, mean_acceptance_length=2.0
        )
        for system, s in seconds.items()
    }
    return [
        Measurement(dtype="fp32", batch_size=batch_size, system=name, prompts=("p",) * batch_size, run=run, runs=runs)
        for name, run in runs.items()
    ]


def test_ratios_are_medians_within_a_prompt() -> None:
    # The machine is ten times slower during the second prompt; ratios do not notice, speeds do.
    samples = [
        *measure({"off": 1.0, "auto": 0.5}),
        *measure({"off": 10.0, "auto": 2.5}),
        *measure({"off": 1.0, "auto": 0.4}),
    ]
    off, auto = make_rows(samples)
    assert off["ratio_to_off"] == 1.0
    assert auto["ratio_to_off"] == 2.5
    assert auto["ratio_to_off_quartiles"] == [2.25, 3.25]
    assert off["tokens_per_s"] == 4.0
    assert auto["tokens_per_s"] == 8.0
    assert auto["ratio_to_transformers"] is None


def test_outputs_that_differ_are_counted() -> None:
    samples = [*measure({"off": 1.0, "auto": 1.0}), *measure({"off": 1.0, "auto": 1.0}, tokens={"auto": [9]})]
    assert [row["share_same_outputs"] for row in make_rows(samples)] == [1.0, 0.5]


@pytest.mark.parametrize("batch_sizes", [(1,), (1, 4)], ids=["alone", "batched"])
def test_results_are_written_and_drawn(tmp_path: Path, batch_sizes: tuple[int, ...]) -> None:
    systems = {"off": 1.0, "auto": 0.5, "transformers": 1.1, "transformers prompt lookup": 0.8, "force 8": 0.6}
    samples = [m for size in batch_sizes for m in measure(systems, batch_size=size)]
    machine = {"gpus": [], "cpu": "some processor", "num_cores": 2}
    model = {"target": "embedded default", "num_target_parameters": 15_000_000}
    results = {"machine": machine, "model": model, "settings": {"max_tokens": 4}, "rows": make_rows(samples)}
    write_json(results, tmp_path / "new" / "results.json")
    draw_offline(results, tmp_path / "new" / "results.png")
    assert json.loads((tmp_path / "new" / "results.json").read_text())["rows"][1]["name"] == "auto, fp32, batch 1"
    assert (tmp_path / "new" / "results.png").stat().st_size > 10_000
    assert rows_table(results["rows"]).row_count == len(results["rows"])
