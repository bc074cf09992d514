"""Rotation and its frequencies equal those of `transformers`, bit for bit where no sum is involved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from jetflow_cluster.layers.rotary import RopeConfig, Rotary, inverse_frequencies, rotate, yarn_attention_factor

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"rope_type": "default", "rope_theta": 1e6}, {"theta": 1e6}),
    "yarn": (YARN, {}),
    "yarn-qwen": (
        YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32768},
        {"theta": 1e6, "original_max_position_embeddings": 32768},
    ),
    "yarn-factor-1": (YARN | {"factor": 1.0}, {"factor": 1.0}),
    "yarn-factor-not-a-power-of-2": (YARN | {"factor": 3.3}, {"factor": 3.3}),
    "yarn-betas": (YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, {"beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn-attention-factor": (YARN | {"attention_factor": 0.7}, {"attention_factor": 0.7}),
    "yarn-mscale": (
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"attention_factor": yarn_attention_factor(4.0, 1.0, 0.5)},
    ),
    "yarn-not-truncated": (YARN | {"truncate": False}, {"truncate": False}),
}


def _parts(case: str, head_dim: int) -> tuple[Qwen3RotaryEmbedding, RopeConfig]:
    parameters, ours = PARAMETERS[case]
    longest = int(parameters.get("original_max_position_embeddings", 64) * parameters.get("factor", 1))
    config = Qwen3Config(head_dim=head_dim, rope_parameters=dict(parameters), max_position_embeddings=longest)
    if parameters["rope_type"] == "yarn":
        base = {"rope_type": "yarn", "theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
        ours = base | ours
    return Qwen3RotaryEmbedding(config), RopeConfig(**ours)


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("head_dim", [2, 16, 128])
def test_frequencies_equal_transformers(case: str, head_dim: int) -> None:
    theirs, config = _parts(case, head_dim)
    frequencies, scale = inverse_frequencies(config, head_dim, CPU)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert scale == theirs.attention_scaling


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        pytest.param(torch.float32, 1e-6, id="fp32"),
        pytest.param(torch.float64, 1e-15, id="fp64"),
        # They round each product, one of which is here not rounded.
        pytest.param(torch.bfloat16, 2**-5, id="bf16"),
    ],
)
@pytest.mark.parametrize("case", ["default", "yarn"])
def test_rotation_equals_transformers(case: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs, config = _parts(case, 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 16, generator=generator, dtype=torch.float64).to(dtype)
    positions = torch.tensor([0, 1, 5, 5, 63, 255, 100_000])
    cos, sin = Rotary(config, 16, CPU).angles(positions, dtype)
    assert cos.dtype == sin.dtype == dtype
    before = x.clone()
    out = rotate(x, cos, sin)
    assert torch.equal(x, before)
    expected, _ = apply_rotary_pos_emb(x, x, *(t[0] for t in theirs(x, positions[None])), unsqueeze_dim=1)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_angles_are_the_computed_ones(dtype: torch.dtype) -> None:
    """In whatever order positions are asked for, and where they are too many to be kept."""
    rotary = Rotary(RopeConfig(), 64, CPU)
    for positions in ([3], [0, 7, 7, 1], [1500, 2], [9], list(range(100)), [8191], [8192, 5], [100_000]):
        asked = torch.tensor(positions)
        kept, computed = rotary.angles(asked, dtype, max(positions)), rotary.angles(asked, dtype)
        assert all(torch.equal(one, other) for one, other in zip(kept, computed, strict=True))


def test_products_of_rotated_heads_depend_on_distance_alone() -> None:
    rotary = Rotary(RopeConfig(), 16, CPU)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(at: int, to: int) -> float:
        rotated = [rotate(x, *rotary.angles(torch.tensor([p]), torch.float64)) for x, p in ((q, at), (k, to))]
        return float((rotated[0] * rotated[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-5)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_type": "linear"}, "rope_type = 'linear': supported are 'default' and 'yarn'"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings = 0"),
    ],
    ids=["type", "no-length"],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)
