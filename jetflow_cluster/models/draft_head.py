"""The draft head: a causal block drafter over the target's hidden states, in the published DFlash/JetSpec format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import Piece, ReplicatedLinear, is_packable, pack, prefixed, project
from jetflow_cluster.layers.norm import RmsNorm
from jetflow_cluster.layers.rotary import Rotary
from jetflow_cluster.models.batch import ForwardBatch, layer_pages
from jetflow_cluster.models.config import TargetConfig, TransformerConfig, transformer_fields, whole_number
from jetflow_cluster.models.qwen3 import Qwen3Layer
from jetflow_cluster.models.stored_files import read_json
from jetflow_cluster.parallel.tp_group import TpGroup


@dataclass(frozen=True, kw_only=True)
class DraftHeadConfig(TransformerConfig):
    """A draft head."""

    #: Anchor plus masks; one token fewer is the deepest guess.
    block_size: int
    #: Layers of the target that it was made for.
    num_target_layers: int
    #: 0-based target layers whose outputs are fused.
    target_layer_ids: tuple[int, ...]
    #: Token whose embedding fills the slots to be guessed.
    mask_token_id: int
    #: True when a slot sees the slots before it only; false is a bidirectional DFlash head.
    causal: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError(f"block_size = {self.block_size}: must be at least 2")
        if not self.target_layer_ids:
            raise ValueError("target_layer_ids is empty: a head reads at least one layer of its target")

    @classmethod
    def from_dir(cls, folder: Path) -> DraftHeadConfig:
        """Reads ``config.json``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a field is missing, contradictory or not supported; names it. So does a head that does not
                say whether it is causal: guessing wrong costs acceptance without an error.
        """
        path = folder / "config.json"
        raw = read_json(path)
        special = raw.get("dflash_config")
        if not isinstance(special, dict):
            raise ValueError(f"{path}: dflash_config is missing; this is no DFlash or JetSpec draft head")
        if raw.get("model_type", "qwen3") != "qwen3":
            raise ValueError(
                f"{path}: model_type = {raw['model_type']!r}: draft heads of model_type 'qwen3' are supported"
            )
        fields = transformer_fields(raw, folder)
        target_hidden = special.get("target_hidden_size")
        if target_hidden not in (None, fields["hidden_size"]):
            raise ValueError(
                f"{path}: dflash_config.target_hidden_size = {target_hidden} with hidden_size = "
                f"{fields['hidden_size']}: heads with hidden_dim_adapter are not supported"
            )
        for key, source in (("block_size", raw), ("num_target_layers", raw), ("mask_token_id", special)):
            if source.get(key) is None:
                raise ValueError(f"{path}: {key} is missing")
        taps = special.get("target_layer_ids")
        num_target_layers = whole_number(raw, "num_target_layers", path)
        if taps is None:
            taps = default_taps(num_target_layers, fields["num_layers"])
        if not isinstance(taps, list) or not all(type(layer) is int for layer in taps):
            raise ValueError(f"{path}: target_layer_ids = {str(taps)[:80]}: must be a list of layers")
        return cls(
            **fields,
            block_size=whole_number(raw, "block_size", path),
            num_target_layers=num_target_layers,
            target_layer_ids=tuple(taps),
            mask_token_id=whole_number(special, "mask_token_id", path),
            causal=_causal_flag(special, path),
        )

    def check_fits(self, target: TargetConfig) -> None:
        """Raises ValueError, with both values, where the head was made for another target."""
        pairs = {
            "hidden_size": (self.hidden_size, target.hidden_size),
            "vocab_size": (self.vocab_size, target.vocab_size),
            "num_target_layers": (self.num_target_layers, target.num_layers),
        }
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise ValueError(f"draft head: {name} = {ours}, the target's is {theirs}")
        outside = [i for i in self.target_layer_ids if not 0 <= i < target.num_layers]
        if outside or list(self.target_layer_ids) != sorted(set(self.target_layer_ids)):
            raise ValueError(
                f"draft head: target_layer_ids = {list(self.target_layer_ids)}: must ascend within "
                f"[0, {target.num_layers - 1}]"
            )
        if not 0 <= self.mask_token_id < target.vocab_size:
            raise ValueError(
                f"draft head: mask_token_id = {self.mask_token_id}: the target's vocabulary has {target.vocab_size}"
            )


def _causal_flag(special: Mapping[str, Any], path: Path) -> bool:
    """JetSpec writes ``causal_head``, other tools write ``causal``."""
    names = ("causal_head", "causal")
    flags = [special[name] for name in names if special.get(name) is not None]
    if not flags or flags[0] != flags[-1]:
        state = "contradict each other" if flags else "are both missing"
        raise ValueError(
            f"{path}: dflash_config.causal_head and dflash_config.causal {state}; set one to true or false"
        )
    if not isinstance(flags[0], bool):
        raise ValueError(f"{path}: dflash_config.causal_head = {flags[0]!r}: must be true or false")
    return flags[0]


def default_taps(num_target_layers: int, num_taps: int) -> list[int]:
    """Taps of a head that names none: evenly from layer 1 to the third from the end; a single one in the middle."""
    if num_taps == 1:
        return [num_target_layers // 2]
    return [round(1 + i * (num_target_layers - 4) / (num_taps - 1)) for i in range(num_taps)]


class DraftFuser(InferenceModule):
    """The part of a draft head that reads the target's taps; each rank holds all of it."""

    def __init__(self, config: DraftHeadConfig):
        super().__init__()
        self.config = config
        self.fc = ReplicatedLinear("fc", len(config.target_layer_ids) * config.hidden_size, config.hidden_size)
        self.hidden_norm = RmsNorm("hidden_norm", config.hidden_size, config.rms_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, activations and KV."""
        return self.fc.weight.dtype

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """Taps ``[N, num_taps * hidden_size]`` to fused hidden vectors ``[N, hidden_size]``."""
        fused: torch.Tensor = self.hidden_norm(self.fc(taps))
        return fused

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from self.fc.pieces()
        yield from self.hidden_norm.pieces()


class DraftHead(DraftFuser):
    """One rank's part of a draft head. Embedding and output layer are the target's.

    A slot's context K and V depend on the token's fused hidden vector and position alone, so they are written to
    pages once per committed token (`project_context`) and never again.
    """

    def __init__(self, config: DraftHeadConfig, tp: TpGroup, device: torch.device):
        super().__init__(config)
        self._stack = [Qwen3Layer(config, tp) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(self._stack)
        self.norm = RmsNorm("norm", config.hidden_size, config.rms_norm_eps)
        self._rotary = Rotary(config.rope, config.head_dim, device)
        #: K and V of all layers as one product, where weights are laid out anew anyway.
        self._packed_context: torch.Tensor | None = None

    @property
    def num_local_heads(self) -> int:
        """Query heads of this rank."""
        return self._stack[0].attention.num_heads

    @property
    def num_local_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self._stack[0].attention.num_kv_heads

    def project_context(
        self,
        fused: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv: torch.Tensor,
        *,
        max_position: int | None = None,
    ) -> None:
        """Writes the context K and V of N tokens, in all layers.

        Args:
            fused: ``[N, hidden_size]``.
            positions: int64 ``[N]``, absolute.
            slot_mapping: int64 ``[N]``.
            kv: ``[num_layers, 2, num_pages, page_size, num_local_kv_heads, head_dim]``.
            max_position: the highest position, where the host knows it.
        """
        cos, sin = self._rotary.angles(positions, fused.dtype, max_position)
        for layer, rows, (k_pages, v_pages) in zip(
            self._stack, self._context_rows(fused), layer_pages(kv), strict=True
        ):
            layer.attention.store_context(rows, cos, sin, slot_mapping, k_pages, v_pages)

    def _context_rows(self, fused: torch.Tensor) -> Sequence[torch.Tensor]:
        """K and V of N tokens in each layer, ``[N, 2 * num_local_kv_heads * head_dim]``."""
        weights = [layer.attention.qkv.kv_weight for layer in self._stack]
        if not is_packable(weights[0], fused.device):
            return [project(fused, weight) for weight in weights]
        if self._packed_context is None:
            self._packed_context = pack(torch.cat(weights))
        return project(fused, weights[0], self._packed_context).chunk(len(weights), 1)

    def forward(self, embeds: torch.Tensor, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor:
        """Blocks of anchor and masks, embedded ``[T, hidden_size]``, to final-normed hidden states of the same shape.

        The output at slot k of a block guesses the token k positions behind the anchor; slot 0 guesses nothing.
        """
        cos, sin = self._rotary.angles(batch.positions, embeds.dtype, batch.max_position)
        x = embeds
        for layer, (k_pages, v_pages) in zip(self._stack, layer_pages(kv), strict=True):
            x = layer(x, cos, sin, batch, k_pages, v_pages)
        out: torch.Tensor = self.norm(x)
        return out

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from super().pieces()
        yield from self.norm.pieces()
        for i, layer in enumerate(self._stack):
            yield from prefixed(f"layers.{i}", layer.pieces())


def head_config_json(config: DraftHeadConfig, *, architecture: str = "DFlashDraftModel") -> dict[str, Any]:
    """The published ``config.json`` of a head; both names of the causal flag are written."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if config.rope.rope_type == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": config.rope.factor,
            "original_max_position_embeddings": config.rope.original_max_position_embeddings,
            "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow,
            "truncate": config.rope.truncate,
        }
        if config.rope.attention_factor is not None:
            rope["attention_factor"] = config.rope.attention_factor
    return {
        "architectures": [architecture],
        "model_type": "qwen3",
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
        "num_hidden_layers": config.num_layers,
        "layer_types": ["full_attention"] * config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
        "dflash_config": {
            "causal_head": config.causal,
            "causal": config.causal,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
        },
    }
