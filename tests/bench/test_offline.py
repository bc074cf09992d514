from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jetflow_cluster.bench.offline import OfflineBenchConfig, run_offline


@pytest.fixture(scope="module")
def results(tiny_target_dir: Path, tiny_head_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    prompts = tmp_path_factory.mktemp("prompts") / "p.txt"
    prompts.write_text("\n---\n".join(["def f(a):", "for i in range(10):\n    x", "import os"]))
    config = OfflineBenchConfig(
        model=str(tiny_target_dir),
        draft_head=str(tiny_head_dir),
        dtypes=("fp64",),
        batch_sizes=(1, 2),
        num_prompts=3,
        max_tokens=8,
        budgets=(4,),
        prompts=prompts,
    )
    shown: list[tuple[str, int, int]] = []
    found = run_offline(config, on_progress=lambda *step: shown.append(step))
    assert shown[-1] == ("fp64: done", shown[-1][2], shown[-1][2])
    return found


def test_every_system_is_measured_on_every_prompt(results: dict[str, Any]) -> None:
    alone = ["off", "auto", "transformers", "transformers prompt lookup", "force 4"]
    assert [(row["system"], row["batch_size"]) for row in results["rows"]] == [
        *((system, 1) for system in alone),
        *((system, 2) for system in alone[:3]),
    ]
    counts = Counter((sample["system"], sample["batch_size"]) for sample in results["samples"])
    assert set(counts.values()) == {3}


def test_all_systems_write_the_same_tokens(results: dict[str, Any]) -> None:
    assert [row["share_same_outputs"] for row in results["rows"]] == [1.0] * len(results["rows"])


def test_rows_have_what_readers_rely_on(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        assert row["tokens_per_s"] > 0
        assert row["ratio_to_off"] > 0
        assert row["mean_acceptance_length"] >= 1.0
    assert results["rows"][0]["ratio_to_off"] == 1.0
    assert results["machine"]["packages"]["torch"]
    assert results["model"]["num_draft_parameters"] > 0


@pytest.mark.parametrize(
    "field, value, message",
    [
        pytest.param("dtypes", ("fp3",), "dtypes = 'fp3'", id="dtype"),
        pytest.param("batch_sizes", (0,), r"batch_sizes = \[0\]: each must be at least 1", id="batch-size"),
        pytest.param("batch_sizes", (), "at least one of each", id="no-batch-size"),
        pytest.param("budgets", (8, 1), "budgets", id="budget"),
        pytest.param("max_tokens", 0, "max_tokens = 0", id="max-tokens"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OfflineBenchConfig(**{field: value})
