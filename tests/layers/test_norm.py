"""The norm equals that of `transformers`, dtype by dtype."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from jetflow_cluster.layers.norm import RmsNorm, rms_norm

CASES = [
    pytest.param(torch.float32, 1e-6, id="fp32"),
    pytest.param(torch.float64, 1e-15, id="fp64"),
    # One rounding of a value that lies between two bf16 numbers.
    pytest.param(torch.bfloat16, 2**-7, id="bf16"),
    pytest.param(torch.float16, 2**-10, id="fp16"),
]


def _reference(size: int, weight: torch.Tensor, eps: float) -> Qwen3RMSNorm:
    norm = Qwen3RMSNorm(size, eps).to(weight.dtype)
    norm.weight.data.copy_(weight)
    return norm


@pytest.mark.parametrize("dtype, tolerance", CASES)
@pytest.mark.parametrize("shape", [(1, 384), (5, 33), (3, 7, 16)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-2], ids=str)
def test_equals_transformers(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(dtype)
    before = x.clone()
    with torch.no_grad():
        out, expected = rms_norm(x, weight, eps), _reference(shape[-1], weight, eps)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype, tolerance", CASES)
def test_a_weight_per_head_on_a_part_of_a_fused_product(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(5, 8, 16, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn(6, 16, generator=generator, dtype=torch.float64).to(dtype)
    out = rms_norm(fused[:, :6], weights, 1e-6)
    with torch.no_grad():
        for head in range(6):
            expected = _reference(16, weights[head], 1e-6)(fused[:, head])
            torch.testing.assert_close(out[:, head], expected, atol=tolerance, rtol=tolerance)


def test_rows_of_zeros_and_of_huge_numbers_stay_finite() -> None:
    x = torch.tensor([[0.0] * 8, [1e18] * 8, [1e-30] * 8])
    out = rms_norm(x, torch.ones(8), 1e-6)
    torch.testing.assert_close(out, torch.tensor([[0.0] * 8, [1.0] * 8, [1e-27] * 8]), atol=1e-6, rtol=0)


def test_module_names_its_tensor() -> None:
    norm = RmsNorm("input_layernorm", 5, 1e-6)
    ((name, shape, slices, destination),) = norm.pieces()
    assert (name, shape, slices) == ("input_layernorm.weight", (5,), (slice(None),))
    destination.copy_(torch.arange(5.0))
    assert torch.equal(norm.weight, torch.arange(5.0))
