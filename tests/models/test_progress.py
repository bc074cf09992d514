"""Loading tells its share and its time."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from jetflow_cluster.models.loader import load_target
from jetflow_cluster.models.progress import LoadProgress
from jetflow_cluster.parallel.tp_group import TpGroup


def test_a_line_now_and_then_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    with caplog.at_level(logging.INFO, "jetflow_cluster"):
        progress = LoadProgress("a model", 8 * 2**20, lambda: now)
        for _ in range(8):
            now += 1.5
            progress.loaded(2**20)
        progress.end()
    assert [record.getMessage() for record in caplog.records] == [
        "a model: 25 % of 8.0 MiB loaded in 3.0 s",
        "a model: 50 % of 8.0 MiB loaded in 6.0 s",
        "a model: 75 % of 8.0 MiB loaded in 9.0 s",
        "a model: 100 % of 8.0 MiB loaded in 12.0 s",
    ]


def test_a_rank_counts_its_own_part(tiny_target_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jetflow_cluster"):
        model = load_target(tiny_target_dir, dtype=None, device=torch.device("cpu"), tp=TpGroup.single())
    held = sum(destination.nbytes for *_, destination in model.pieces())
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tiny_target_dir}: 100 % of {held / 2**20:,.1f} MiB")
