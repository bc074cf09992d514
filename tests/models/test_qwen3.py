"""The target equals `transformers`, dense and in ragged batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jetflow_cluster.models.loader import load_target
from jetflow_cluster.parallel.tp_group import TpGroup
from support.paged import empty_kv, make_batch

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "gqa-tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mha-untied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "mqa-wide-heads": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    "yarn": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


def write_model(folder: Path, dtype: torch.dtype, **shape: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    defaults: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**(defaults | shape))).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_and_taps_equal_transformers(tmp_path: Path, shape: str, dtype: torch.dtype, tolerance: float) -> None:
    reference = write_model(tmp_path, dtype, **SHAPES[shape])
    model = load_target(tmp_path, dtype=dtype, device=CPU, tp=TpGroup.single())
    kv = empty_kv(3, model.num_local_kv_heads, model.config.head_dim, dtype)
    ids = torch.randint(0, 64, (27,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = reference(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    hidden, taps = [], []
    for start, stop in ((0, 13), (13, 14), (14, 27)):
        part, tapped = model(make_batch([ids[start:stop]], [start], [None]), kv, (0, 1))
        hidden.append(part)
        taps.append(tapped)
    logits = model.compute_logits(torch.cat(hidden))
    torch.testing.assert_close(logits, expected.logits[0], atol=tolerance, rtol=0)
    states = torch.cat((expected.hidden_states[1][0], expected.hidden_states[2][0]), -1)
    torch.testing.assert_close(torch.cat(taps), states, atol=tolerance, rtol=0)


@torch.inference_mode()
def test_ragged_batch_of_chunk_token_and_tree(tmp_path: Path) -> None:
    reference = write_model(tmp_path, torch.float64, **SHAPES["gqa-tied"])
    model = load_target(tmp_path, dtype=None, device=CPU, tp=TpGroup.single())
    assert model.dtype == torch.float64
    kv = empty_kv(3, 2, 16, torch.float64)
    prompts = [[5, 9, 2], [7] * 6, [1, 2, 3, 4, 5, 6, 7]]
    model(make_batch(prompts, [0, 0, 0], [None] * 3), kv)
    chunk, token, tree = [11, 12, 13, 14], [33], [20, 21, 22, 23, 24, 25]
    parents = [-1, 0, 0, 1, 3, 2]
    hidden, taps = model(make_batch([chunk, token, tree], [3, 6, 7], [None, None, parents]), kv, (1,))
    logits = model.compute_logits(hidden)

    def dense(ids: list[int]) -> Any:
        return reference(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)

    rows = [prompts[0] + chunk[: i + 1] for i in range(4)] + [prompts[1] + token]
    for node in range(6):
        path, at = [], node
        while at >= 0:
            path.append(tree[at])
            at = parents[at]
        rows.append(prompts[2] + path[::-1])
    for i, ids in enumerate(rows):
        expected = dense(ids)
        torch.testing.assert_close(logits[i], expected.logits[0, -1], atol=1e-9, rtol=0)
        assert taps is not None
        torch.testing.assert_close(taps[i], expected.hidden_states[2][0, -1], atol=1e-9, rtol=0)
