"""Model configurations as `config.json` gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetflow_cluster.layers.rotary import RopeConfig

_YARN_KEYS = ("beta_fast", "beta_slow", "attention_factor")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a stack of Qwen3 layers."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    #: Name of the dtype that the checkpoint was saved in.
    dtype: str


@dataclass(frozen=True, kw_only=True)
class TargetConfig(TransformerConfig):
    """A target model."""

    architecture: str
    tie_word_embeddings: bool
    #: Tokens that end a text, of the configuration and the generation configuration.
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dir(cls, folder: Path) -> TargetConfig:
        """Reads ``config.json`` and ``generation_config.json``.

        Raises:
            FileNotFoundError: there is no ``config.json``.
            ValueError: a field is missing or asks for what is not supported; names it.
        """
        raw = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        eos = raw.get("eos_token_id")
        if generation.exists():
            eos = read_json(generation).get("eos_token_id", eos)
        architecture = (raw.get("architectures") or ["none"])[0]
        return cls(
            **transformer_fields(raw, folder),
            architecture=architecture,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is no checkpoint: {path.name} is missing")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def transformer_fields(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of `TransformerConfig`, in the style of transformers 4 or 5."""
    _refuse_unsupported(raw, folder)
    try:
        hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        return {
            "hidden_size": hidden,
            "num_layers": int(raw["num_hidden_layers"]),
            "num_heads": heads,
            "num_kv_heads": int(raw.get("num_key_value_heads") or heads),
            "head_dim": int(raw.get("head_dim") or hidden // heads),
            "intermediate_size": int(raw["intermediate_size"]),
            "vocab_size": int(raw["vocab_size"]),
            "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
            "rope": rope_config(raw, folder),
            "max_position_embeddings": int(raw.get("max_position_embeddings", 32768)),
            "dtype": str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        }
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: {error.args[0]} is missing") from None


def rope_config(raw: Mapping[str, Any], folder: Path) -> RopeConfig:
    """``rope_parameters``, or ``rope_theta`` with ``rope_scaling``."""
    given = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = str(given.get("rope_type") or given.get("type") or "default")
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise ValueError(f"{folder / 'config.json'}: rope_type = {kind!r}: supported are 'default' and 'yarn'")
    original = given.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    extra = {key: float(given[key]) for key in _YARN_KEYS if given.get(key) is not None}
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=float(given["factor"]),
        original_max_position_embeddings=int(original or 0),
        **extra,
    )


def _refuse_unsupported(raw: Mapping[str, Any], folder: Path) -> None:
    """Names what would change the result and is not computed here."""
    where = folder / "config.json"
    if raw.get("attention_bias"):
        raise ValueError(f"{where}: attention_bias = true: not supported")
    if raw.get("use_sliding_window"):
        raise ValueError(f"{where}: use_sliding_window = true: not supported, only full attention is")
    odd = sorted({kind for kind in raw.get("layer_types") or () if kind != "full_attention"})
    if odd:
        raise ValueError(f"{where}: layer_types has {', '.join(odd)}: only full_attention is supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act = {raw['hidden_act']!r}: only 'silu' is supported")
    if raw.get("quantization_config"):
        raise ValueError(f"{where}: quantization_config: quantised checkpoints are not supported")
