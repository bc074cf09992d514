"""`config.json` in the styles of transformers 4 and 5, and what is refused by name, value and limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jetflow_cluster.layers.rotary import RopeConfig
from jetflow_cluster.models.config import TargetConfig, rope_config
from jetflow_cluster.models.draft_head import DraftHeadConfig, head_config_json
from jetflow_cluster.models.stored_files import read_json

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
}
HEAD: dict[str, Any] = BASE | {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "block_size": 16,
    "num_target_layers": 36,
    "num_hidden_layers": 5,
    "dflash_config": {"causal_head": True, "mask_token_id": 63, "target_layer_ids": [1, 9]},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
PLAIN_YARN = RopeConfig(
    rope_type="yarn",
    theta=1e6,
    factor=4.0,
    original_max_position_embeddings=1024,
    attention_factor=1.1386294361119891,
)


def _target(folder: Path, **changes: Any) -> TargetConfig:
    raw = {key: value for key, value in (BASE | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return TargetConfig.from_dir(folder)


@pytest.mark.parametrize(
    "fields, expected",
    [
        pytest.param({"rope_theta": 5e5}, RopeConfig(theta=5e5), id="theta"),
        pytest.param({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5), id="theta-null-scaling"),
        pytest.param({}, RopeConfig(theta=1e4), id="nothing"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(theta=5e5), id="parameters"
        ),
        pytest.param({"rope_theta": 1e6, "rope_scaling": YARN}, PLAIN_YARN, id="scaling"),
        pytest.param(
            {"rope_theta": 1e6, "rope_scaling": {**YARN, "rope_type": ..., "type": "yarn"}}, PLAIN_YARN, id="type"
        ),
        pytest.param({"rope_parameters": YARN | {"rope_theta": 1e6}}, PLAIN_YARN, id="parameters-yarn"),
        pytest.param(
            {"rope_theta": 1e6, "rope_scaling": {**YARN, "factor": None}}, PLAIN_YARN, id="factor-from-the-lengths"
        ),
        pytest.param(
            {"rope_theta": 1e6, "rope_scaling": {**YARN, "beta_fast": None, "mscale": None}},
            PLAIN_YARN,
            id="nulls-are-defaults",
        ),
    ],
)
def test_both_styles_of_rope(fields: dict[str, Any], expected: RopeConfig) -> None:
    raw: dict[str, Any] = {"max_position_embeddings": 4096}
    for key, value in fields.items():
        raw[key] = {k: v for k, v in value.items() if v is not ...} if isinstance(value, dict) else value
    assert rope_config(raw, Path("checkpoint")) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"attention_bias": True}, "attention_bias = True: only false", id="bias"),
        pytest.param({"use_sliding_window": True}, "use_sliding_window = True: only false", id="sliding"),
        pytest.param({"layer_types": ["linear_attention"]}, "layer_types has linear_attention: only full", id="types"),
        pytest.param({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'", id="activation"),
        pytest.param({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}", id="quantised"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear': supported are 'default'", id="rope"),
        pytest.param({"rope_scaling": YARN | {"ntk": 3}}, "ntk = 3: no parameter", id="yarn-key"),
        pytest.param({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25: only 1", id="partial"),
        pytest.param(
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for full_attention", id="nested-rope"
        ),
        pytest.param({"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn': supported are float32", id="dtype"),
        pytest.param({"num_attention_heads": 5}, "num_heads = 5: must be a multiple of num_kv_heads = 2", id="groups"),
        pytest.param({"head_dim": 15}, "head_dim = 15: must be even", id="odd"),
        pytest.param({"vocab_size": 0}, "vocab_size = 0: must be at least 1", id="zero"),
        *(
            pytest.param({name: ...}, f"{name} is missing", id=f"no-{name}")
            for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size")
        ),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _target(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, field, expected",
    [
        ({"head_dim": None}, "head_dim", 8),
        ({"num_key_value_heads": None}, "num_kv_heads", 4),
        ({"torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"dtype": "float16"}, "dtype", "float16"),
        ({}, "dtype", None),
        ({"sliding_window": 4096, "use_sliding_window": False}, "num_layers", 3),
        ({"eos_token_id": [3, 5]}, "eos_token_ids", (3, 5)),
        ({"eos_token_id": 3}, "eos_token_ids", (3,)),
        ({"eos_token_id": None}, "eos_token_ids", ()),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_fields(tmp_path: Path, changes: dict[str, Any], field: str, expected: object) -> None:
    assert getattr(_target(tmp_path, **changes), field) == expected


@pytest.mark.parametrize(
    "generation, expected", [({"eos_token_id": [7, 8]}, (7, 8)), ({"eos_token_id": None}, (3,)), ({}, (3,))], ids=str
)
def test_ends_of_text_of_the_generation_config(
    tmp_path: Path, generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert _target(tmp_path, eos_token_id=3).eos_token_ids == expected


@pytest.mark.parametrize("text, message", [("[1]", "must be a JSON object"), ("{", "config.json: ")], ids=str)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        read_json(tmp_path / "nowhere" / "config.json")


def _head(folder: Path, special: dict[str, Any], **changes: Any) -> DraftHeadConfig:
    given = {key: value for key, value in (HEAD["dflash_config"] | special).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(HEAD | {"dflash_config": given} | changes))
    return DraftHeadConfig.from_dir(folder)


@pytest.mark.parametrize(
    "special, changes, message",
    [
        pytest.param({"causal_head": ...}, {}, "causal are both missing", id="no-flag"),
        pytest.param({"causal_head": None}, {}, "causal are both missing", id="null-flag"),
        pytest.param({"causal": False}, {}, "contradict each other", id="two-flags"),
        pytest.param({"causal_head": "false"}, {}, "causal_head = 'false': must be true or false", id="text-flag"),
        pytest.param({"mask_token_id": ...}, {}, "mask_token_id is missing", id="no-mask"),
        pytest.param({"target_layer_ids": []}, {}, "target_layer_ids is empty", id="no-taps"),
        pytest.param({"target_hidden_size": 64}, {}, "target_hidden_size = 64 with hidden_size = 32", id="adapter"),
        pytest.param({}, {"block_size": 1}, "block_size = 1: must be at least 2", id="block"),
        pytest.param({}, {"model_type": "gemma4"}, "model_type = 'gemma4': draft heads of model_type", id="family"),
        pytest.param({}, {"dflash_config": None}, "dflash_config is missing", id="no-head"),
    ],
)
def test_heads_that_are_refused(tmp_path: Path, special: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _head(tmp_path, special, **changes)


def test_a_head_without_taps_has_the_default_ones(tmp_path: Path) -> None:
    assert _head(tmp_path, {"target_layer_ids": ...}).target_layer_ids == (1, 9, 17, 25, 33)


@pytest.mark.parametrize("rope", [{"rope_theta": 1e7}, {"rope_theta": 1e6, "rope_scaling": YARN | {"beta_fast": 8}}])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_written_configuration_reads_back(tmp_path: Path, rope: dict[str, Any], causal: bool) -> None:
    config = _head(tmp_path, {"causal_head": causal}, **rope)
    (tmp_path / "config.json").write_text(json.dumps(head_config_json(config)))
    assert DraftHeadConfig.from_dir(tmp_path) == config
