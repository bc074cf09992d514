"""The whole engine over the Triton kernels says what it says over plain torch; see `test_interpreted.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jetflow_kernels.commit_kv import kernel as commit_op
from jetflow_kernels.qk_norm_rope_store import kernel as store_op
from jetflow_kernels.tree_attention import kernel as attention_op
from support.mixed_batches import make_requests, run_mixed
from support.near_ties import assert_same_tokens
from support.oracle import Oracle
from support.small_models import EOS_ID, write_head, write_target

MAX_LEN = 128


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    target = write_target(
        tmp_path_factory.mktemp("target"), dtype=torch.float32, num_layers=2, max_len=MAX_LEN, head_dim=64
    )
    return target, write_head(tmp_path_factory.mktemp("head"), target)


def _count(monkeypatch: pytest.MonkeyPatch, calls: dict[str, int], module: Any, name: str) -> None:
    launch = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        return launch(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def test_same_tokens_as_plain_torch(folders: tuple[Path, Path], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, head = folders
    prompts, params = make_requests(3, max_tokens=7)
    options: dict[str, Any] = {"dtype": "float32", "draft_dtype": "float32"}
    calls: dict[str, int] = {}
    for module, name in (
        (commit_op, "commit_kv_triton"),
        (store_op, "qk_norm_rope_store_triton"),
        (attention_op, "attend"),
    ):
        _count(monkeypatch, calls, module, name)
    found = run_mixed(target, head, prompts, params, device=device, **options)
    assert min(calls.values()) > 3
    assert len(calls) == 3
    assert any(output.speculation.num_accepted_tokens for output in found)

    calls.clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    expected = run_mixed(target, head, prompts, params, device="cpu", **options)
    assert not calls
    oracle = Oracle(target, torch.float64, frozenset({EOS_ID}), MAX_LEN)
    assert_same_tokens([o.token_ids for o in found], [o.token_ids for o in expected], prompts, params, oracle)
