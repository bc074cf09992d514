"""Named shapes of targets and draft heads, and models of such a shape with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from jetflow_cluster.layers.embedding import ParallelLmHead
from jetflow_cluster.layers.linear import Linear
from jetflow_cluster.layers.rotary import RopeConfig
from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.models.draft_head import DraftFuser, DraftHead, DraftHeadConfig, default_taps
from jetflow_cluster.models.registry import TARGETS, TargetModel
from jetflow_cluster.models.target_ends import TargetEnds
from jetflow_cluster.parallel.tp_group import TpGroup

#: hidden_size, layers, heads, KV heads, head_dim, intermediate_size, vocabulary, tied output layer; as published.
_TARGETS = {
    "tiny": (64, 4, 4, 2, 16, 96, 512, False),
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "qwen3-4b": (2560, 36, 32, 8, 128, 9728, 151936, True),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12288, 151936, False),
    "qwen3-14b": (5120, 40, 40, 8, 128, 17408, 151936, False),
    "qwen3-32b": (5120, 64, 64, 8, 128, 25600, 151936, False),
}
#: Layers and taps of the draft head, as the published one of Qwen3-8B has; a small target gets a small one.
_HEAD_LAYERS, _TINY_HEAD_LAYERS = 5, 2
_BLOCK_SIZE = 16
_MAX_LEN = 2**17

SHAPES = tuple(_TARGETS)

_Model = TypeVar("_Model", TargetModel, DraftHead)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A target and a draft head of the same widths."""

    name: str
    target: TargetConfig
    head: DraftHeadConfig

    @classmethod
    def of(cls, name: str) -> Shape:
        """By name. Raises ValueError for one that is not known."""
        if name not in _TARGETS:
            raise ValueError(f"shape = {name!r}: must be one of {', '.join(SHAPES)}")
        hidden, layers, heads, kv_heads, head_dim, inner, vocab, tied = _TARGETS[name]
        head_layers = _TINY_HEAD_LAYERS if name == "tiny" else _HEAD_LAYERS
        common: dict[str, Any] = {
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": inner,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-6,
            "rope": RopeConfig(theta=1e6),
            "max_position_embeddings": _MAX_LEN,
            "dtype": None,
        }
        return cls(
            name=name,
            target=TargetConfig(
                **common,
                num_layers=layers,
                architecture="Qwen3ForCausalLM",
                tie_word_embeddings=tied,
                eos_token_ids=(),
            ),
            head=DraftHeadConfig(
                **common,
                num_layers=head_layers,
                block_size=_BLOCK_SIZE,
                num_target_layers=layers,
                target_layer_ids=tuple(default_taps(layers, head_layers)),
                mask_token_id=vocab - 1,
                causal=True,
            ),
        )


def blank_models(shape: Shape, dtype: torch.dtype) -> tuple[TargetModel, DraftHead]:
    """Both without weights, on the meta device."""
    meta, tp = torch.device("meta"), TpGroup.single()
    with meta:
        target = TARGETS[shape.target.architecture](shape.target, tp, meta)
        head = DraftHead(shape.head, tp, meta)
    return target.to(dtype), head.to(dtype)


def random_models(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[TargetModel, DraftHead]:
    """Both with random weights, as a loader would leave them."""
    tp = TpGroup.single()
    with torch.device("meta"):
        target = TARGETS[shape.target.architecture](shape.target, tp, device)
        head = DraftHead(shape.head, tp, device)
    return _fill(target, dtype, device), _fill(head, dtype, device)


def _fill(model: _Model, dtype: torch.dtype, device: torch.device) -> _Model:
    model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, (Linear, ParallelLmHead)):
            module.pack()
    return model.eval()


def parameter_bytes(model: TargetEnds | DraftFuser) -> int:
    """Of all weights; a tied output layer counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
