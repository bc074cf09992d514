"""Where steps are replayed from graphs, and that the log says where not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from jetflow_cluster import LLM
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine.resolve import compute_device, why_no_graphs
from jetflow_cluster.parallel.tp_group import TpGroup
from support.adversaries import NoDrafter


@pytest.mark.parametrize(
    ("device", "options", "backend", "reason"),
    [
        pytest.param("cuda", {}, None, None, id="one-gpu"),
        pytest.param("cuda:1", {}, None, None, id="another-gpu"),
        pytest.param("cpu", {}, None, "device = cpu", id="cpu"),
        pytest.param("cuda", {"cuda_graphs": False}, None, "cuda_graphs = False", id="switched-off"),
        pytest.param("cuda", {}, "nccl", None, id="ranks"),
        pytest.param("cuda", {}, "gloo", "tensor_parallel_size = 2", id="ranks-on-the-host"),
        pytest.param("cpu", {}, "gloo", "device = cpu", id="ranks-on-a-cpu"),
    ],
)
def test_rule(
    device: str, options: dict[str, Any], backend: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_backend", lambda group: backend)
    tp = TpGroup.single() if backend is None else TpGroup(0, 2)
    found = why_no_graphs(EngineConfig(**options, tensor_parallel_size=tp.size), torch.device(device), tp)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_another_gpu_than_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert compute_device(EngineConfig(device="cuda:1")) == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"device = 'cuda:0': this process launches on cuda:1; .*DEVICES=0"):
        compute_device(EngineConfig(device="cuda:0"))


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:2", "torch finds 2 CUDA devices"), ("cuda:x", "must be auto, cpu, cuda or cuda:N")]
)
def test_no_such_device(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=f"device = '{device}': .*{message}"):
        compute_device(EngineConfig(device=device))


@pytest.mark.parametrize("options", [{}, {"drafter_factory": lambda *_: NoDrafter()}], ids=["head", "other-drafter"])
def test_the_log_says_it_once(
    tiny_target: str, tiny_head: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    head = None if options else tiny_head
    with caplog.at_level(logging.INFO, "jetflow_cluster"):
        LLM(tiny_target, head, num_pages=16, tree_nodes={1: 1}, device="cpu", **options).generate([[1, 2]])
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("steps are")]
    assert said == ["steps are computed launch by launch: device = cpu: only CUDA records graphs"]
