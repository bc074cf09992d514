"""The draft head as it is trained: dense attention over many blocks of many sequences at once.

Parameter names and shapes are the published ones, so a state dict goes to `models.draft_head` as it is.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from jetflow_cluster.layers.rotary import inverse_frequencies
from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.models.draft_head import DraftHeadConfig, default_taps
from jetflow_cluster.models.loader import save_draft_head
from jetflow_cluster.training.regenerate import load_tokenizer

Angles = tuple[torch.Tensor, torch.Tensor]


def mask_token_of(target: Path, given: int | None) -> int:
    """The token that fills the slots to be guessed."""
    if given is not None:
        return given
    tokenizer = load_tokenizer(target)
    for name in ("<|mask|>", "<|MASK|>", "[MASK]", "<mask>"):
        if (found := tokenizer.token_to_id(name)) is not None:
            return int(found)
    return TargetConfig.from_dir(target).vocab_size - 1


def taps_of(num_layers: int, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """Tapped layers of a target of so many: those given, or three spread over it as published heads do.

    Raises:
        ValueError: those given are no layers of it, or do not ascend.
    """
    last = num_layers - 1
    if given is None:
        # A target of few layers has none where heads of large ones look.
        return tuple(sorted({min(max(tap, 0), last) for tap in default_taps(num_layers, 3)}))
    if not given or list(given) != sorted(set(given)) or given[0] < 0 or given[-1] > last:
        raise ValueError(f"target_layer_ids = {list(given)}: must ascend within [0, {last}]")
    return tuple(given)


def head_config_for(
    target: TargetConfig,
    *,
    num_layers: int,
    block_size: int,
    target_layer_ids: tuple[int, ...],
    mask_token_id: int,
    causal: bool = True,
) -> DraftHeadConfig:
    """A head whose layers have the shape of the target's own."""
    return DraftHeadConfig(
        hidden_size=target.hidden_size,
        num_layers=num_layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        intermediate_size=target.intermediate_size,
        vocab_size=target.vocab_size,
        rms_norm_eps=target.rms_norm_eps,
        rope=target.rope,
        max_position_embeddings=target.max_position_embeddings,
        dtype="bfloat16",
        block_size=block_size,
        num_target_layers=target.num_layers,
        target_layer_ids=target_layer_ids,
        mask_token_id=mask_token_id,
        causal=causal,
    )


class _Norm(nn.Module):
    """RMS norm, computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape, fp32."""
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class _Attention(nn.Module):
    def __init__(self, config: DraftHeadConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = _Norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = _Norm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        block_angles: Angles,
        context_angles: Angles,
        context_bias: torch.Tensor,
        block_bias: torch.Tensor,
    ) -> torch.Tensor:
        """Blocks ``[S, A, B, H]`` over contexts ``[S, L, H]`` and themselves, to ``[S, A, B, H]``."""
        num_seqs, num_blocks, size, _ = x.shape
        length, groups = context.shape[1], self.heads // self.kv_heads
        q = _rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), *block_angles)
        kb = _rotate(self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))), *block_angles)
        vb = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        kc = _rotate(self.k_norm(self.k_proj(context).unflatten(-1, (-1, self.head_dim))), *context_angles)
        vc = self.v_proj(context).unflatten(-1, (-1, self.head_dim))
        # [S, kv heads, blocks, groups * slots, dim]: queries of one KV head beside each other.
        compute = vc.dtype
        q = q.unflatten(3, (self.kv_heads, groups)).permute(0, 3, 1, 4, 2, 5) * self.head_dim**-0.5
        q = q.reshape(num_seqs, self.kv_heads, num_blocks, groups * size, self.head_dim).to(compute)
        kb, vb = (t.permute(0, 3, 1, 2, 4).to(compute) for t in (kb, vb))
        kc, vc = (t.permute(0, 2, 1, 3).to(compute) for t in (kc, vc))
        far = (q.flatten(2, 3) @ kc.transpose(-1, -2)).view(*q.shape[:4], length).float()
        near = (q @ kb.transpose(-1, -2)).float()
        far = far + context_bias[:, None, :, None, :]
        near = near + block_bias.repeat(groups, 1)
        weights = torch.cat((far, near), -1).softmax(-1).to(compute)
        out = (weights[..., :length].flatten(2, 3) @ vc).view_as(q) + weights[..., length:] @ vb
        out = out.view(num_seqs, self.kv_heads, num_blocks, groups, size, self.head_dim)
        return self.o_proj(out.permute(0, 2, 4, 1, 3, 5).flatten(3))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates ``[..., heads, dim]`` by ``[..., 1, dim]``."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class _Mlp(nn.Module):
    def __init__(self, config: DraftHeadConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """SwiGLU."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: DraftHeadConfig):
        super().__init__()
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _Mlp(config)


class TrainableHead(nn.Module):
    """A draft head in fp32. Embedding and output layer stay with the target."""

    def __init__(self, config: DraftHeadConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = _Norm(hidden, config.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = _Norm(hidden, config.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def angles(self, length: int, device: torch.device | None = None) -> Angles:
        """Cosines and sines of the positions below `length`, each fp32 ``[length, head_dim]``."""
        frequencies, scale = inverse_frequencies(self.config.rope, self.config.head_dim, device or torch.device("cpu"))
        angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * scale, angles.sin() * scale

    def forward(
        self, taps: torch.Tensor, embeds: torch.Tensor, anchors: torch.Tensor, starts: torch.Tensor, angles: Angles
    ) -> torch.Tensor:
        """What the guessing slots of many blocks see.

        Every block sees the taps strictly before its anchor, its own slots (those before, when causal), and no
        other block.

        Args:
            taps: ``[S, L, num_taps * target_hidden]``.
            embeds: embedded blocks, anchor first, ``[S, A, B, H]``.
            anchors: index of each block's anchor in its sequence, int64 ``[S, A]``.
            starts: index of each sequence's first real token, int64 ``[S]``.
            angles: of at least ``L + B`` positions.

        Returns:
            Final-normed hidden states of slots 1 to B - 1, fp32 ``[S, A, B - 1, H]``.
        """
        size, length = embeds.shape[2], taps.shape[1]
        context = self.hidden_norm(self.fc(taps))
        cos, sin = angles
        positions = anchors[:, :, None] + torch.arange(size, device=anchors.device)
        block_angles = cos[positions][..., None, :], sin[positions][..., None, :]
        context_angles = cos[None, :length, None], sin[None, :length, None]
        index = torch.arange(length, device=anchors.device)
        seen = (index < anchors[..., None]) & (index >= starts[:, None, None])
        context_bias = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -1e9)
        block_bias = torch.zeros(size, size, device=seen.device)
        if self.config.causal:
            later = torch.ones(size, size, dtype=torch.bool, device=seen.device).triu(1)
            block_bias = block_bias.masked_fill(later, -1e9)
        x = embeds
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            inner = layer.input_layernorm(x)
            x = x + layer.self_attn(inner, context, block_angles, context_angles, context_bias, block_bias)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x[:, :, 1:])


@torch.no_grad()
def warm_start(head: TrainableHead, target_state: dict[str, torch.Tensor], *, seed: int = 0) -> None:
    """Copies what the target has learned: the layers of a head with L layers start as target layers spread from the
    first to the last, a single one as the last; ``fc`` as the first tap plus half the last, with a little noise.
    """
    num_target = head.config.num_target_layers
    num = head.config.num_layers
    sources = [num_target - 1] if num == 1 else [round(i * (num_target - 1) / (num - 1)) for i in range(num)]
    for layer, source in zip(head.layers, sources, strict=True):
        prefix = f"model.layers.{source}."
        layer.load_state_dict({n[len(prefix) :]: t.float() for n, t in target_state.items() if n.startswith(prefix)})
    head.norm.weight.copy_(target_state["model.norm.weight"])
    head.hidden_norm.weight.copy_(target_state["model.layers.0.input_layernorm.weight"])
    hidden = head.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    head.fc.weight.normal_(std=0.1 * hidden**-0.5, generator=generator)
    head.fc.weight[:, :hidden] += torch.eye(hidden)
    head.fc.weight[:, -hidden:] += 0.5 * torch.eye(hidden)


def save_head(folder: Path, head: TrainableHead, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the published format."""
    folder.mkdir(parents=True, exist_ok=True)
    save_draft_head(folder, head.config, {n: t.detach().to("cpu", dtype) for n, t in head.state_dict().items()})


def load_head(folder: Path, *, wanted: DraftHeadConfig | None = None) -> TrainableHead:
    """Reads the published format, as fp32.

    Raises:
        ValueError: what `DraftHeadConfig.from_dir` raises, or a field is not as in `wanted`; names it.
    """
    head = TrainableHead(DraftHeadConfig.from_dir(folder))
    for field in fields(wanted) if wanted is not None else ():
        theirs, ours = getattr(head.config, field.name), getattr(wanted, field.name)
        if theirs != ours:
            raise ValueError(f"{folder}: its {field.name} = {theirs}, this run's is {ours}")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    head.load_state_dict({n: t.float() for name in names for n, t in load_file(folder / name).items()})
    return head.eval()
