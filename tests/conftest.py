"""Checkpoints that tests share: a tiny random target with a byte-level tokenizer, and a draft head that fits it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY_VOCAB = 320
TINY_HIDDEN = 32
TINY_TAPS = (1, 2)
TINY_BLOCK = 8
_TEXT = "def add(first, second):\n    return first + second\n\n\nfor item in range(10):\n    print(item)\n" * 3


@pytest.fixture(scope="session")
def tiny_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 checkpoint (4 layers, 4 query and 2 KV heads, 512 positions) as `transformers` writes it."""
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "target"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=TINY_VOCAB,
        hidden_size=TINY_HIDDEN,
        num_hidden_layers=4,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        # Wide weights, so that greedy text does not repeat one token and the best two logits lie apart.
        initializer_range=0.4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_tokenizer(), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level_tokenizer() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB,
        special_tokens=["<|endoftext|>", "<|mask|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_head_dir(tiny_target_dir: Path) -> Path:
    """A random causal draft head (2 layers, block of 8) for `tiny_target_dir`, in the published format."""
    import torch
    from safetensors.torch import save_file

    folder = tiny_target_dir.parent / "draft_head"
    folder.mkdir()
    hidden, intermediate, heads, kv_heads, head_dim, num_layers = TINY_HIDDEN, 64, 4, 2, 16, 2
    generator = torch.Generator().manual_seed(1)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    state = {"fc.weight": matrix(hidden, hidden * len(TINY_TAPS))}
    for i in range(num_layers):
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        state |= {
            f"{attention}.q_proj.weight": matrix(heads * head_dim, hidden),
            f"{attention}.k_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{attention}.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{attention}.o_proj.weight": matrix(hidden, heads * head_dim),
            f"{attention}.q_norm.weight": torch.ones(head_dim),
            f"{attention}.k_norm.weight": torch.ones(head_dim),
            f"{mlp}.gate_proj.weight": matrix(intermediate, hidden),
            f"{mlp}.up_proj.weight": matrix(intermediate, hidden),
            f"{mlp}.down_proj.weight": matrix(hidden, intermediate),
            f"layers.{i}.input_layernorm.weight": torch.ones(hidden),
            f"layers.{i}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    state |= {"hidden_norm.weight": torch.ones(hidden), "norm.weight": torch.ones(hidden)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": TINY_BLOCK,
        "num_target_layers": 4,
        "num_hidden_layers": num_layers,
        "layer_types": ["full_attention"] * num_layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "vocab_size": TINY_VOCAB,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "dflash_config": {"causal_head": True, "mask_token_id": 1, "target_layer_ids": list(TINY_TAPS)},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
