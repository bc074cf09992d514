"""Takes loops out of a small target's greedy text: sequence-level unlikelihood training (arXiv 1908.04319).

A small model trained by likelihood alone falls into loops when it decodes greedily. Here it continues prompts
greedily, and the tokens with which it repeats itself are made less likely, while half of every batch goes on with the
text as it is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from jetflow_cluster.training.optim import lr_factor
from jetflow_cluster.training.regenerate import continue_prompts, use_fast_decoding

#: A token that ends an n-gram of this size which its continuation already holds is a repetition. Of library code
#: 4 % of tokens are.
REPEATED_NGRAM = 6
PROMPT_TOKENS = 128
NEW_TOKENS = 128
#: Prompts of one round, and rows of one step, half of which are text as it is.
ROUND_PROMPTS = 256
STEP_ROWS = 32
LEARNING_RATE = 4e-4


def repetitions(ids: np.ndarray, ngram: int = REPEATED_NGRAM) -> np.ndarray:
    """Marks tokens that end an n-gram seen before in the same row; bool, of the shape ``[R, L]`` of `ids`."""
    marks = np.zeros(ids.shape, dtype=bool)
    for row, mark in zip(ids.tolist(), marks, strict=True):
        seen = set()
        for end in range(ngram, len(row) + 1):
            gram = tuple(row[end - ngram : end])
            mark[end - 1] = gram in seen
            seen.add(gram)
    return marks


def losses(model: Any, ids: torch.Tensor, repeated: torch.Tensor, num_text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the first `num_text` rows, and -log(1 - p) of the repeated tokens of the others, each per token
    that counts."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = F.linear(hidden, model.lm_head.weight)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    nats = nats.view(ids.shape[0], -1)
    # log(1 - p) has no gradient at p = 1, and none worth having beyond.
    unlikely = -torch.log((1.0 - torch.exp(-nats[num_text:])).clamp(min=1e-4))
    penalty = (unlikely * repeated[:, 1:]).sum() / (repeated.shape[0] * NEW_TOKENS)
    return nats[:num_text].mean(), penalty


def discourage_loops(
    model: Any,
    text: Callable[[int, int, int], torch.Tensor],
    *,
    max_minutes: float,
    device: str = "cpu",
) -> list[float]:
    """Trains the model in place, round after round until the time is up.

    Args:
        model: a `transformers` causal language model in fp32.
        text: step, rows and length to ids ``[rows, length]`` of training text, a pure function of the step.
        max_minutes: of everything.
        device: where the model is.

    Returns:
        Share of repeated tokens in the continuations of each round.
    """
    console, started = Console(), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses_of = torch.compile(losses, dynamic=False)
    half = STEP_ROWS // 2
    shares: list[float] = []
    step = 0

    def fraction() -> float:
        return (time.monotonic() - started) / (60 * max_minutes)

    while fraction() < 1.0:
        prompts = text(1_000_000 + len(shares), ROUND_PROMPTS, PROMPT_TOKENS)
        made = _continue(model, prompts, device)
        marks = np.zeros(made.shape, dtype=bool)
        marks[:, PROMPT_TOKENS:] = repetitions(made[:, PROMPT_TOKENS:])
        shares.append(float(marks[:, PROMPT_TOKENS:].mean()))
        console.print(
            f"{fraction():6.1%}  step {step}  {shares[-1]:.1%} of greedy tokens are repetitions", highlight=False
        )
        for first in range(0, ROUND_PROMPTS, half):
            if (done := fraction()) >= 1.0:
                break
            rows = slice(first, first + half)
            ids = torch.cat((text(2_000_000 + step, half, made.shape[1]), torch.from_numpy(made[rows])))
            plain, penalty = losses_of(model, ids.to(device), torch.from_numpy(marks[rows]).to(device).float(), half)
            (plain + penalty).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * lr_factor(done, warmup=0.02, decay_from=0.3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    return shares


def _continue(model: Any, prompts: torch.Tensor, device: str) -> np.ndarray:
    low = copy.deepcopy(model).to(torch.bfloat16).eval()
    if device == "cpu":
        use_fast_decoding(low)
    parts = [
        continue_prompts(low, rows.numpy(), NEW_TOKENS, device=device) for rows in prompts.split(min(256, len(prompts)))
    ]
    return np.concatenate(parts)
