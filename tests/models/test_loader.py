"""What is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jetflow_cluster.models.hub import resolve_checkpoint
from jetflow_cluster.models.loader import load_draft_head, load_sidecar, load_target
from jetflow_cluster.parallel.tp_group import TpGroup
from support.small_models import write_head, write_target

CPU = torch.device("cpu")


def _load(folder: Path) -> Any:
    return load_target(folder, dtype=torch.float32, device=CPU, tp=TpGroup.single())


def _edit(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        raw.pop(key, None) if value is None else raw.update({key: value})
    path.write_text(json.dumps(raw))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM: supported are Qwen3ForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type = 'llama3'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_features_are_named(target: Path, change: dict[str, Any], message: str) -> None:
    _edit(target / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        _load(target)


def test_missing_unexpected_and_misshapen_tensors_are_named(target: Path) -> None:
    state = load_file(target / "model.safetensors")
    del state["model.norm.weight"]
    state["model.extra.weight"] = torch.zeros(1)
    state["lm_head.weight"] = state["lm_head.weight"][:10].clone()
    save_file(state, target / "model.safetensors")
    with pytest.raises(ValueError, match="missing") as caught:
        _load(target)
    for part in ("missing model.norm.weight", "unexpected model.extra.weight", "lm_head.weight is [10, 32]"):
        assert part in str(caught.value)


def test_indexed_checkpoint_equals_a_single_file(target: Path) -> None:
    expected = _load(target).state_dict()
    state = load_file(target / "model.safetensors")
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, target / name)
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (target / "model.safetensors").unlink()
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, tensor in _load(target).state_dict().items():
        assert torch.equal(tensor, expected[name])
    (target / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names b\.safetensors"):
        _load(target)


def test_pickles_are_not_read(target: Path) -> None:
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin may hold code"):
        _load(target)


def test_names_that_are_no_checkpoint() -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_checkpoint("./nowhere")


def test_older_style_of_rope(target: Path) -> None:
    _edit(target / "config.json", rope_parameters=None, rope_theta=5e5)
    assert _load(target).config.rope.theta == 5e5


@pytest.fixture
def head(target: Path) -> Path:
    folder = target / "head"
    folder.mkdir()
    return write_head(folder, target)


@pytest.mark.parametrize("flags", [{"causal_head": True}, {"causal": True}, {"causal_head": False, "causal": False}])
def test_both_names_of_the_causal_flag(target: Path, head: Path, flags: dict[str, bool]) -> None:
    special = json.loads((head / "config.json").read_text())["dflash_config"]
    del special["causal_head"]
    _edit(head / "config.json", dflash_config=special | flags)
    loaded = load_draft_head(head, _load(target), device=CPU, tp=TpGroup.single())
    assert loaded.config.causal is next(iter(flags.values()))


@pytest.mark.parametrize(
    ("flags", "message"), [({}, "both missing"), ({"causal_head": True, "causal": False}, "contradict")]
)
def test_causality_is_not_guessed(target: Path, head: Path, flags: dict[str, bool], message: str) -> None:
    special = json.loads((head / "config.json").read_text())["dflash_config"]
    del special["causal_head"]
    _edit(head / "config.json", dflash_config=special | flags)
    with pytest.raises(ValueError, match=message):
        load_draft_head(head, _load(target), device=CPU, tp=TpGroup.single())


@pytest.mark.parametrize(
    ("change", "special", "message"),
    [
        ({"hidden_size": 64}, {}, "hidden_size = 64, the target's is 32"),
        ({"vocab_size": 99}, {}, "vocab_size = 99"),
        ({"num_target_layers": 36}, {}, "num_target_layers = 36"),
        ({}, {"target_layer_ids": [0, 2]}, "target_layer_ids"),
        ({}, {"mask_token_id": 288}, "mask_token_id = 288"),
        ({}, {"target_hidden_size": 16}, "hidden_dim_adapter"),
        ({"block_size": 1}, {}, "block_size = 1"),
    ],
    ids=["hidden", "vocabulary", "layers", "taps", "mask", "adapter", "block"],
)
def test_heads_that_do_not_fit(
    target: Path, head: Path, change: dict[str, Any], special: dict[str, Any], message: str
) -> None:
    config = json.loads((head / "config.json").read_text())["dflash_config"]
    _edit(head / "config.json", dflash_config=config | special, **change)
    with pytest.raises(ValueError, match=message):
        load_draft_head(head, _load(target), device=CPU, tp=TpGroup.single())


def test_sidecar_of_another_target_is_refused(target: Path, head: Path) -> None:
    model = _load(target)
    assert load_sidecar(head, model, device=CPU) is not None
    _edit(head / "sidecar_config.json", target_fingerprint="0" * 32)
    with pytest.raises(ValueError, match="target_fingerprint"):
        load_sidecar(head, model, device=CPU)
    (head / "sidecar_config.json").unlink()
    assert load_sidecar(head, model, device=CPU) is None
