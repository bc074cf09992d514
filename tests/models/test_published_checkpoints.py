"""Checkpoints of published sizes load unchanged. Files are sparse and weights on the meta device: both take no room."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.models.loader import load_draft_head, load_target
from jetflow_cluster.parallel.tp_group import TpGroup

META = torch.device("meta")
SHARED: dict[str, Any] = {
    "block_size": 16,
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
HEADS: dict[str, dict[str, Any]] = {
    "qwen3-8b": SHARED
    | {
        "num_hidden_layers": 5,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_target_layers": 36,
        "vocab_size": 151936,
        "rope_theta": 1e6,
        "dflash_config": {"causal_head": True, "mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    },
    "qwen3.6-35b-a3b": SHARED
    | {
        "num_hidden_layers": 8,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_target_layers": 40,
        "vocab_size": 248320,
        "rope_theta": 1e7,
        "dflash_config": {"causal_head": True, "mask_token_id": 248070, "target_layer_ids": [1, 10, 19, 28, 37]},
    },
}
PARAMETERS = {"qwen3-8b": 1_048_626_432, "qwen3.6-35b-a3b": 473_995_264}


def layer_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    q, kv = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.q_norm.weight": (dim,),
        "self_attn.k_norm.weight": (dim,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def head_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = raw["hidden_size"]
    taps = len(raw["dflash_config"]["target_layer_ids"])
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, taps * hidden), "hidden_norm.weight": (hidden,)}
    shapes["norm.weight"] = (hidden,)
    for i in range(raw["num_hidden_layers"]):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer_shapes(raw).items()}
    return shapes


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16 zeros that takes a page or two of the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def _write(folder: Path, raw: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    write_sparse(folder / "model.safetensors", shapes)
    return folder


def _target_of(raw: dict[str, Any], folder: Path) -> TargetConfig:
    target = raw | {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": raw["num_target_layers"]}
    (folder / "target").mkdir()
    (folder / "target" / "config.json").write_text(json.dumps(target))
    return TargetConfig.from_dir(folder / "target")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_published_heads(tmp_path: Path, name: str, size: int) -> None:
    raw = HEADS[name]
    folder = _write(tmp_path, raw, head_shapes(raw))
    assert sum(math.prod(shape) for shape in head_shapes(raw).values()) == PARAMETERS[name]
    target = _target_of(raw, tmp_path)
    for rank in range(size):
        head = load_draft_head(folder, target, device=META, tp=TpGroup(rank, size))
        assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.bfloat16)}
        assert head.num_local_kv_heads == max(1, raw["num_key_value_heads"] // size)
        assert head.config.block_size == 16


@pytest.mark.parametrize("change", ["adapter", "taps", "missing"])
def test_published_head_with_other_tensors(tmp_path: Path, change: str) -> None:
    raw = HEADS["qwen3-8b"]
    shapes = head_shapes(raw)
    if change == "adapter":
        shapes["hidden_dim_adapter.proj.weight"] = (4096, 2048)
        message = r"unexpected hidden_dim_adapter\.proj\.weight"
    elif change == "taps":
        raw = raw | {"dflash_config": raw["dflash_config"] | {"target_layer_ids": [1, 9, 17]}}
        message = r"fc\.weight is \[4096, 20480\], not \[4096, 12288\]"
    else:
        del shapes["layers.4.mlp.down_proj.weight"]
        message = r"missing layers\.4\.mlp\.down_proj\.weight"
    folder = _write(tmp_path, raw, shapes)
    with pytest.raises(ValueError, match=message):
        load_draft_head(folder, _target_of(raw, tmp_path), device=META, tp=TpGroup.single())


def test_a_target_of_8_billion_parameters_in_five_files(tmp_path: Path) -> None:
    raw = HEADS["qwen3-8b"] | {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, 4096), "model.norm.weight": (4096,)}
    shapes["lm_head.weight"] = (151936, 4096)
    for i in range(36):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(raw).items()}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    weight_map = {}
    for part in range(5):
        file = f"model-{part + 1:05d}-of-00005.safetensors"
        names = list(shapes)[part::5]
        write_sparse(tmp_path / file, {name: shapes[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load_target(tmp_path, dtype=None, device=META, tp=TpGroup(3, 4))
    assert model.config.rope.theta == 1e6
    assert model.layers[35].mlp.gate_up.weight.shape == (2 * 12288 // 4, 4096)
    assert sum(math.prod(shape) for shape in shapes.values()) == 8_190_735_360
