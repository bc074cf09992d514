"""What a configuration means on this machine: in which dtype, and by which instructions."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from jetflow_cluster import LLM
from jetflow_cluster.config import DTYPES, EngineConfig
from jetflow_cluster.engine.resolve import arithmetic, compute_dtype, describe_dtype, weights_dtype
from jetflow_kernels.machine import ISAS, machine
from support.small_models import write_target

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_is_float32_on_a_cpu_whatever_is_stored(tmp_path: Path, stored: torch.dtype) -> None:
    llm = LLM(str(write_target(tmp_path, dtype=stored)), num_pages=40, max_model_len=64)
    assert llm.engine.target.model.dtype is torch.float32
    assert len(llm.generate([[1, 2, 3]])[0].token_ids) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_type_rounds_the_weights_even_where_it_is_not_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    wide = write_target(tmp_path, dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="jetflow_cluster"):
        logging.getLogger("jetflow_cluster").propagate = True
        target = LLM(str(wide), dtype=dtype, num_pages=40, max_model_len=64).engine.target
    assert target.model.dtype is torch.float32
    for weight in target.model.parameters():
        assert torch.equal(weight, weight.to(getattr(torch, dtype)).float())
    assert f"dtype = {dtype}: weights are rounded to it and computed with in float32" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sentence_says_which_and_why(dtype: str) -> None:
    config = EngineConfig(dtype=dtype)
    said = describe_dtype(config, CPU)
    assert said.startswith(f"dtype = {dtype}: ") and "\n" not in said
    assert str(compute_dtype(config, CPU)).removeprefix("torch.") in said or "as asked for" in said or "digits" in said
    # On a GPU nothing is computed in another type than was asked for.
    assert weights_dtype(config, CUDA) is None


def test_two_starts_compute_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig()
    assert arithmetic(config) == arithmetic(config)
    before = arithmetic(config)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert arithmetic(config) != before or before.onednn in ("SSE41", "")


def test_an_instruction_set_that_is_not_here_starts_nothing(
    tiny_target_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = next(isa for isa in ISAS if isa not in machine().isas)
    monkeypatch.setenv("JETFLOW_CPU_ISA", missing)
    with pytest.raises(ValueError, match=f"JETFLOW_CPU_ISA = '{missing}': this processor"):
        LLM(str(tiny_target_dir), num_pages=40)
