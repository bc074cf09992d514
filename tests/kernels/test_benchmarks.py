"""The benchmarks of the ops run, and find their op right, on whatever device is there and on one that is pretended."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from support.pretend_gpu import pretended_gpu

FOLDER = Path(__file__).parent.parent.parent / "kernels" / "benchmarks"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


CASES = pytest.mark.parametrize(
    ("op", "case"),
    [
        ("tree_attention", (2, 5, 20, torch.float32)),
        ("qk_norm_rope_store", (3, torch.float32)),
        ("commit_kv", (2, 3)),
        ("build_tree", (2, 6)),
        ("accept_tree", (2, 5, 3, False)),
        ("accept_tree", (2, 5, 3, True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)


@CASES
def test_one_row(op: str, case: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    _check(op, case, DEVICE, monkeypatch)


@CASES
def test_one_row_on_a_gpu(op: str, case: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    # Without kernels a large vocabulary takes seconds.
    monkeypatch.setitem(importlib.import_module("accept_tree").VOCAB_SIZE, "cuda", 4096)
    with pretended_gpu(monkeypatch) as gpu:
        _check(op, case, "cuda", monkeypatch)
    assert any(name.startswith("tree_attention.attend" if op == "tree_attention" else op) for name in gpu.launches)


def _check(op: str, case: tuple[object, ...], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    measure = importlib.import_module(op).measure
    row = measure(*case, device, 1e10)
    assert row[f"{op}_us"] > 0.0
    assert row["share_of_copy_bandwidth"] > 0.0
