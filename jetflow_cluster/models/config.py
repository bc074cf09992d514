"""Model configurations as `config.json` gives them. What would change the result and is not computed is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jetflow_cluster.layers.rotary import RopeConfig, yarn_attention_factor

_POSITIVE = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_YARN_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a stack of Qwen3 layers. Raises ValueError, with the numbers, for sizes that cannot be."""

    #: Width of the residual stream.
    hidden_size: int
    #: Decoder layers.
    num_layers: int
    #: Query heads; a multiple of `num_kv_heads`.
    num_heads: int
    #: Key and value heads.
    num_kv_heads: int
    #: Width of one head; even. Need not be ``hidden_size / num_heads``.
    head_dim: int
    #: Inner width of the SwiGLU layer.
    intermediate_size: int
    #: Token ids are below it.
    vocab_size: int
    #: Added to the mean square in every norm.
    rms_norm_eps: float
    #: Rotary embedding.
    rope: RopeConfig
    #: Longest sequence.
    max_position_embeddings: int
    #: Name of the dtype that the checkpoint was saved in; None where the configuration does not say. How a model is
    #: stored does not make it another one.
    dtype: str | None = field(compare=False)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads}: must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: must be even")


@dataclass(frozen=True, kw_only=True)
class TargetConfig(TransformerConfig):
    """A target model."""

    #: Class name by which the family is found.
    architecture: str
    #: The output layer is the embedding.
    tie_word_embeddings: bool
    #: Tokens that end a text; those of the generation configuration where there are any.
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
        eos = read_json(generation).get("eos_token_id") if generation.exists() else None
        if eos is None:
            eos = raw.get("eos_token_id")
        return cls(
            **transformer_fields(raw, folder),
            architecture=str((raw.get("architectures") or ["none"])[0]),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError for what is no JSON object."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is no checkpoint: {path.name} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return found


def transformer_fields(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of `TransformerConfig`, in the style of transformers 4 or 5.

    Raises:
        ValueError: a field is missing or asks for what is not supported; names file, field, value and what is
            supported.
    """
    where = folder / "config.json"
    _refuse_unsupported(raw, where)
    try:
        hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        # Null stands for the plain value; absent could be either that or a class's own default.
        kv_heads, head_dim = raw["num_key_value_heads"], raw["head_dim"]
        return {
            "hidden_size": hidden,
            "num_layers": int(raw["num_hidden_layers"]),
            "num_heads": heads,
            "num_kv_heads": heads if kv_heads is None else int(kv_heads),
            "head_dim": hidden // heads if head_dim is None else int(head_dim),
            "intermediate_size": int(raw["intermediate_size"]),
            "vocab_size": int(raw["vocab_size"]),
            "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
            "rope": rope_config(raw, folder),
            "max_position_embeddings": int(raw.get("max_position_embeddings", 32768)),
            "dtype": _dtype_name(raw, where),
        }
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]} is missing") from None


def rope_config(raw: Mapping[str, Any], folder: Path) -> RopeConfig:
    """From ``rope_parameters``, or from ``rope_theta`` with ``rope_scaling``. Raises ValueError as the above does."""
    where = folder / "config.json"
    given = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    kind = str(given.get("rope_type") or given.get("type") or "default")
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    nested = sorted(key for key, value in given.items() if isinstance(value, dict))
    if nested:
        raise ValueError(f"{where}: rope parameters for {', '.join(nested)}: one set for all layers is supported")
    share = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor = {share}: only 1 is supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise ValueError(f"{where}: rope_type = {kind!r}: supported are 'default' and 'yarn'")
    unknown = sorted(given.keys() - _YARN_KEYS)
    if unknown:
        raise ValueError(f"{where}: {unknown[0]} = {given[unknown[0]]!r}: no parameter of rope_type 'yarn'")
    longest = raw.get("max_position_embeddings", 32768)
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or longest
    factor = float(longest / original if given.get("factor") is None else given["factor"])
    attention = given.get("attention_factor")
    if attention is None:
        attention = yarn_attention_factor(factor, given.get("mscale"), given.get("mscale_all_dim"))
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=int(original),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=float(attention),
        truncate=bool(given.get("truncate", True)),
    )


def _dtype_name(raw: Mapping[str, Any], where: Path) -> str | None:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name not in (None, "float32", "float64", "bfloat16", "float16"):
        raise ValueError(f"{where}: dtype = {name!r}: supported are float32, float64, bfloat16 and float16")
    return name


def _refuse_unsupported(raw: Mapping[str, Any], where: Path) -> None:
    if raw.get("attention_bias"):
        raise ValueError(f"{where}: attention_bias = {raw['attention_bias']}: only false is supported")
    if raw.get("use_sliding_window"):
        raise ValueError(f"{where}: use_sliding_window = {raw['use_sliding_window']}: only false is supported")
    odd = sorted({str(kind) for kind in raw.get("layer_types") or () if kind != "full_attention"})
    if odd:
        raise ValueError(f"{where}: layer_types has {', '.join(odd)}: only full_attention is supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act = {raw['hidden_act']!r}: only 'silu' is supported")
    if raw.get("quantization_config"):
        raise ValueError(f"{where}: quantization_config = {raw['quantization_config']}: only unquantised weights are")
