"""Model configurations as `config.json` gives them. What would change the result and is not computed is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jetflow_cluster.layers.rotary import RopeConfig, yarn_attention_factor
from jetflow_cluster.models.stored_files import read_json

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
#: No model comes near. Bytes of tensors then stay within 64 bits.
_SIZE_LIMIT, _WIDTH_LIMIT = 2**31, 2**24
_REAL_LIMIT = 1e30
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
        if self.num_heads * self.head_dim >= _WIDTH_LIMIT:
            sizes = f"num_heads = {self.num_heads}, head_dim = {self.head_dim}"
            raise ValueError(f"{sizes}: their product must be below {_WIDTH_LIMIT}")
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
            architecture=architecture_of(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=_token_ids(eos, folder),
        )


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The class that a configuration names; ``none`` where it names none."""
    named = raw.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "none"


def whole_number(raw: Mapping[str, Any], name: str, where: Path, *, default: int | None = None) -> int:
    """A size. Raises ValueError naming file, field and value unless it is a whole number that a size can be."""
    value = raw.get(name, default)
    if value is None and name not in raw:
        raise ValueError(f"{where}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or value >= _SIZE_LIMIT:
        raise ValueError(f"{where}: {name} = {str(value)[:80]!s}: must be a whole number below {_SIZE_LIMIT}")
    return int(value)


def _real(raw: Mapping[str, Any], name: str, where: Path, default: float | None = None) -> float:
    """A finite number; ValueError otherwise."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _REAL_LIMIT:
        raise ValueError(f"{where}: {name} = {str(value)[:80]}: must be a number")
    return float(value)


def _token_ids(eos: Any, folder: Path) -> tuple[int, ...]:
    listed = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) for token in listed):
        raise ValueError(f"{folder / 'config.json'}: eos_token_id = {str(eos)[:80]}: must be token ids")
    return tuple(listed)


def transformer_fields(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of `TransformerConfig`, in the style of transformers 4 or 5.

    Raises:
        ValueError: a field is missing or asks for what is not supported; names file, field, value and what is
            supported.
    """
    where = folder / "config.json"
    _refuse_unsupported(raw, where)
    hidden, heads = whole_number(raw, "hidden_size", where), whole_number(raw, "num_attention_heads", where)
    if heads < 1:
        raise ValueError(f"{where}: num_attention_heads = {heads}: must be at least 1")
    # Null stands for the plain value; absent could be either that or a class's own default.
    plain = {"num_key_value_heads": heads, "head_dim": hidden // heads}
    for name in plain:
        if name not in raw:
            raise ValueError(f"{where}: {name} is missing")
    kv_heads, head_dim = (
        number if raw[name] is None else whole_number(raw, name, where) for name, number in plain.items()
    )
    return {
        "hidden_size": hidden,
        "num_layers": whole_number(raw, "num_hidden_layers", where),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": whole_number(raw, "intermediate_size", where),
        "vocab_size": whole_number(raw, "vocab_size", where),
        "rms_norm_eps": _real(raw, "rms_norm_eps", where, 1e-6),
        "rope": rope_config(raw, folder),
        "max_position_embeddings": whole_number(raw, "max_position_embeddings", where, default=32768),
        "dtype": _dtype_name(raw, where),
    }


def rope_config(raw: Mapping[str, Any], folder: Path) -> RopeConfig:
    """From ``rope_parameters``, or from ``rope_theta`` with ``rope_scaling``. Raises ValueError as the above does."""
    where = folder / "config.json"
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: rope parameters = {str(found)[:80]}: must be a JSON object")
    given = dict(found)
    kind = str(given.get("rope_type") or given.get("type") or "default")
    theta = _real(given, "rope_theta", where, _real(raw, "rope_theta", where, 10000.0))
    if theta <= 0:
        raise ValueError(f"{where}: rope_theta = {theta}: must be above 0")
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
    longest = whole_number(raw, "max_position_embeddings", where, default=32768)
    name = "original_max_position_embeddings"
    original = whole_number({name: raw.get(name) or given.get(name) or longest}, name, where)
    factor = _real(given, "factor", where, longest / max(original, 1))
    scales = [None if given.get(key) is None else _real(given, key, where) for key in ("mscale", "mscale_all_dim")]
    attention = _real(given, "attention_factor", where, yarn_attention_factor(factor, *scales))
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=_real(given, "beta_fast", where, 32.0) or 32.0,
        beta_slow=_real(given, "beta_slow", where, 1.0) or 1.0,
        attention_factor=attention,
        truncate=bool(given.get("truncate", True)),
    )


def _dtype_name(raw: Mapping[str, Any], where: Path) -> str | None:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None or name in ("float32", "float64", "bfloat16", "float16"):
        return name
    raise ValueError(f"{where}: dtype = {name!r}: supported are float32, float64, bfloat16 and float16")


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
