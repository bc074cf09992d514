"""The paged draft head against the published formula, computed densely and from nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.models.draft_head import DraftHead, DraftHeadConfig, default_taps, head_config_json
from jetflow_cluster.models.loader import load_draft_head, load_target, save_draft_head
from jetflow_cluster.models.qwen3 import Qwen3Model
from jetflow_cluster.parallel.tp_group import TpGroup
from support.paged import TABLE, empty_kv, make_batch
from support.small_models import MASK_ID, write_head, write_target

CPU = torch.device("cpu")


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rounded = x.float()
    normed = rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype)


def _rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    inverse = 1.0 / 10000.0 ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
    angles = positions[:, None].float() * inverse
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def slow_head(
    state: dict[str, torch.Tensor], config: DraftHeadConfig, taps: torch.Tensor, embeds: torch.Tensor
) -> torch.Tensor:
    """The formula as it is written: context of C tokens, one block at C; everything is computed again."""
    count, slots, dim = taps.shape[0], embeds.shape[0], config.head_dim
    context = _norm(taps @ state["fc.weight"].T, state["hidden_norm.weight"])
    far, near = torch.arange(count), torch.arange(count, count + slots)
    x = embeds
    for i in range(config.num_layers):
        w = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"layers.{i}.")}

        def heads(rows: torch.Tensor, name: str, w: dict[str, torch.Tensor] = w) -> torch.Tensor:
            return (rows @ w[f"self_attn.{name}_proj.weight"].T).view(rows.shape[0], -1, dim)

        h = _norm(x, w["input_layernorm.weight"])
        q = _rope(_norm(heads(h, "q"), w["self_attn.q_norm.weight"]), near)
        k_norm = w["self_attn.k_norm.weight"]
        k = torch.cat((_rope(_norm(heads(context, "k"), k_norm), far), _rope(_norm(heads(h, "k"), k_norm), near)))
        v = torch.cat((heads(context, "v"), heads(h, "v")))
        k, v = (t.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for t in (k, v))
        scores = torch.einsum("shd,thd->hst", q, k) * dim**-0.5
        if config.causal:
            hidden = torch.ones(slots, slots, dtype=torch.bool).triu(1)
            scores[..., count:] = scores[..., count:].masked_fill(hidden, float("-inf"))
        mixed = torch.einsum("hst,thd->shd", scores.softmax(-1), v).reshape(slots, -1)
        x = x + mixed @ w["self_attn.o_proj.weight"].T
        h = _norm(x, w["post_attention_layernorm.weight"])
        gate = F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
        x = x + gate @ w["mlp.down_proj.weight"].T
    return _norm(x, state["norm.weight"])


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Qwen3Model, Path]:
    target_dir = write_target(tmp_path, num_layers=4)
    (tmp_path / "head").mkdir()
    write_head(tmp_path / "head", target_dir, sidecar=False)
    return load_target(target_dir, dtype=torch.float64, device=CPU, tp=TpGroup.single()), tmp_path / "head"


def _slots(request: int, start: int, stop: int) -> torch.Tensor:
    return torch.tensor([int(TABLE[request, i // 4]) * 4 + i % 4 for i in range(start, stop)])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cuts", [(0, 9), (0, 1, 9), (0, 4, 5, 9), tuple(range(10))], ids=str)
@torch.inference_mode()
def test_paged_head_equals_the_formula(parts: tuple[Qwen3Model, Path], causal: bool, cuts: tuple[int, ...]) -> None:
    target, folder = parts
    raw = json.loads((folder / "config.json").read_text())
    raw["dflash_config"]["causal_head"] = causal
    (folder / "config.json").write_text(json.dumps(raw))
    head = load_draft_head(folder, target, device=CPU, tp=TpGroup.single())
    state = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(3)
    taps = [torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (9, 5)]
    kv = empty_kv(2, 2, 16, torch.float64)
    # The first request's context arrives in pieces, the second's at once; each layer holds every token once.
    for start, stop in itertools.pairwise(cuts):
        head.project_context(head.fuse(taps[0][start:stop]), torch.arange(start, stop), _slots(0, start, stop), kv)
    head.project_context(head.fuse(taps[1]), torch.arange(5), _slots(1, 0, 5), kv)
    per_layer = (~kv[:, 0].isnan()).flatten(3).all(-1).flatten(1).sum(1)
    assert per_layer.tolist() == [14, 14]
    blocks = [[7] + [MASK_ID] * 7, [9] + [MASK_ID] * 7]
    batch = make_batch(blocks, [9, 5], [None, None])
    if not causal:
        batch.attention.bidirectional = True
    out = head(target.embed(batch.token_ids), batch, kv)
    for r in range(2):
        embeds = target.embed(torch.tensor(blocks[r]))
        expected = slow_head(state, head.config, taps[r], embeds)
        torch.testing.assert_close(out[8 * r : 8 * r + 8], expected, atol=1e-9, rtol=0)


PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
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
    "qwen3.6-35b-a3b": {
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


def _published_keys(config: DraftHeadConfig) -> dict[str, tuple[int, ...]]:
    hidden, dim = config.hidden_size, config.head_dim
    keys = {"fc.weight": (hidden, 5 * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for i in range(config.num_layers):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (config.num_heads * dim, hidden),
            "self_attn.k_proj.weight": (config.num_kv_heads * dim, hidden),
            "self_attn.v_proj.weight": (config.num_kv_heads * dim, hidden),
            "self_attn.o_proj.weight": (hidden, config.num_heads * dim),
            "self_attn.q_norm.weight": (dim,),
            "self_attn.k_norm.weight": (dim,),
            "mlp.gate_proj.weight": (config.intermediate_size, hidden),
            "mlp.up_proj.weight": (config.intermediate_size, hidden),
            "mlp.down_proj.weight": (hidden, config.intermediate_size),
        }
        keys |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return keys


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tp_size", [1, 4])
def test_published_shapes(tmp_path: Path, name: str, tp_size: int) -> None:
    shared = {"block_size": 16, "head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name] | shared | {"dtype": "bfloat16"}))
    config = DraftHeadConfig.from_dir(tmp_path)
    assert (config.causal, config.block_size, len(config.target_layer_ids)) == (True, 16, 5)
    for rank in range(tp_size):
        with torch.device("meta"):
            head = DraftHead(config, TpGroup(rank, tp_size), CPU)
        read: dict[str, tuple[int, ...]] = {}
        for key, shape, slices, destination in head.pieces():
            read[key] = shape
            synthetic = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            destination.copy_(synthetic[slices])
        assert read == _published_keys(config)
    target = TargetConfig(
        **{field: getattr(config, field) for field in ("hidden_size", "num_heads", "num_kv_heads", "head_dim")},
        **{field: getattr(config, field) for field in ("intermediate_size", "vocab_size", "rms_norm_eps", "rope")},
        max_position_embeddings=40960,
        dtype="bfloat16",
        num_layers=config.num_target_layers,
        architecture="Qwen3ForCausalLM",
        tie_word_embeddings=False,
        eos_token_ids=(),
    )
    config.check_fits(target)


@pytest.mark.parametrize(
    ("layers", "taps", "expected"),
    [(36, 5, [1, 9, 17, 25, 33]), (40, 5, [1, 10, 19, 28, 37]), (8, 3, [1, 3, 5]), (8, 1, [4])],
    ids=str,
)
def test_default_taps(layers: int, taps: int, expected: list[int]) -> None:
    assert default_taps(layers, taps) == expected


def test_saved_head_reads_back(parts: tuple[Qwen3Model, Path], tmp_path: Path) -> None:
    _, folder = parts
    config, state = DraftHeadConfig.from_dir(folder), load_file(folder / "model.safetensors")
    save_draft_head(tmp_path / "copy", config, state)
    assert DraftHeadConfig.from_dir(tmp_path / "copy") == config
    special = head_config_json(config)["dflash_config"]
    assert special["causal_head"] is special["causal"] is True
    for name, tensor in load_file(tmp_path / "copy" / "model.safetensors").items():
        assert torch.equal(tensor, state[name])
    with pytest.raises(ValueError, match=r"missing fc\.weight"):
        save_draft_head(tmp_path / "broken", config, {k: v for k, v in state.items() if k != "fc.weight"})
