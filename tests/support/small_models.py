"""Small random checkpoints in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

#: Bytes come first, so any text has ids.
VOCAB_SIZE = 288
EOS_ID = 256
MASK_ID = 257


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges; ids 258 and up are whole words that no text is encoded to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    vocab |= {"<|endoftext|>": EOS_ID, "<|mask|>": MASK_ID}
    vocab |= {f"word{i}": i for i in range(len(vocab), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|mask|>"])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_target(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    num_layers: int = 2,
    max_len: int = 1024,
    head_dim: int = 16,
) -> Path:
    """A random Qwen3 target with GQA and a tokenizer; sharp enough that its tokens are not all alike."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=num_layers,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        tie_word_embeddings=False,
        max_position_embeddings=max_len,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.35,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_head(
    folder: Path, target: Path, *, seed: int = 1, block_size: int = 8, causal: bool = True, sidecar: bool = True
) -> Path:
    """A random draft head for a target of `write_target`, in the published format, with a side-car."""
    import json

    from safetensors.torch import save_file

    raw = json.loads((target / "config.json").read_text())
    taps = [0] if raw["num_hidden_layers"] < 4 else [1, raw["num_hidden_layers"] - 2]
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": block_size,
        "num_target_layers": raw["num_hidden_layers"],
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": raw["head_dim"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "vocab_size": raw["vocab_size"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "dflash_config": {"causal_head": causal, "mask_token_id": MASK_ID, "target_layer_ids": taps},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = _head_state(len(taps), seed, raw["head_dim"])
    save_file(state, folder / "model.safetensors")
    if sidecar:
        # The loader compares in the dtype of the checkpoint, so the fingerprint is that of the stored embedding.
        from safetensors import safe_open

        from jetflow_cluster.models.sidecar import SideCar, SideCarConfig, fingerprint, save_sidecar

        with safe_open(target / "model.safetensors", framework="pt") as file:
            embedding = file.get_tensor("model.embed_tokens.weight")
        sidecar_config = SideCarConfig(
            rank=4,
            width=16,
            target_fingerprint=fingerprint({"embedding": embedding}),
            head_fingerprint=fingerprint(state),
        )
        save_sidecar(folder, SideCar(sidecar_config, *(torch.randn(raw["vocab_size"], 4) * 0.3 for _ in range(2))))
    return folder


def _head_state(num_taps: int, seed: int, dim: int) -> dict[str, torch.Tensor]:
    """Random tensors under the published names."""
    hidden, heads, kv_heads = 32, 4, 2
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32) * 0.3

    state = {"fc.weight": matrix(hidden, hidden * num_taps), "hidden_norm.weight": torch.ones(hidden)}
    state["norm.weight"] = torch.ones(hidden)
    for i in range(2):
        layer = f"layers.{i}."
        state |= {
            layer + "input_layernorm.weight": torch.ones(hidden),
            layer + "post_attention_layernorm.weight": torch.ones(hidden),
            layer + "self_attn.q_proj.weight": matrix(heads * dim, hidden),
            layer + "self_attn.k_proj.weight": matrix(kv_heads * dim, hidden),
            layer + "self_attn.v_proj.weight": matrix(kv_heads * dim, hidden),
            layer + "self_attn.o_proj.weight": matrix(hidden, heads * dim),
            layer + "self_attn.q_norm.weight": torch.ones(dim),
            layer + "self_attn.k_norm.weight": torch.ones(dim),
            layer + "mlp.gate_proj.weight": matrix(48, hidden),
            layer + "mlp.up_proj.weight": matrix(48, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, 48),
        }
    return state


#: Roles and contents in brackets; the answer's opening at the end.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_chat_template(folder: Path) -> None:
    """Makes a target of `write_target` one that can be talked to."""
    import json

    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
