"""Acceptance of draft trees along texts that the target has already written.

Lossless speculation emits exactly the target's own text, so a step's outcome follows from that text: anchored at a
token, the tree is walked along what comes next, and the next anchor lies behind what was accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jetflow_cluster.training.head_model import TrainableHead
from jetflow_cluster.training.regenerate import continue_prompts
from jetflow_cluster.tree.build import CandidateTable
from jetflow_cluster.tree.coupled import Correction, DraftSampling, candidate_tables
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.tree.noise import gumbel_noise


@dataclass(kw_only=True)
class Rollouts:
    """Texts of the target, and what it saw while writing them."""

    #: int64 ``[P, prompt_tokens + num_tokens + spare]``.
    tokens: torch.Tensor
    #: Tokens of each prompt. The first generated one comes from the prompt's own pass and is the first anchor.
    prompt_tokens: int
    #: Generated tokens that are walked, the first anchor not counted; those behind are there to be guessed.
    num_tokens: int
    #: 0 is greedy.
    temperature: float
    #: Target layers that were tapped.
    tap_ids: tuple[int, ...]
    #: fp32 ``[P, length, num_taps * hidden]``.
    taps: torch.Tensor
    #: The target's embedding and output layer, fp32 ``[V, H]`` each.
    embedding: torch.Tensor
    output: torch.Tensor

    @property
    def num_prompts(self) -> int:
        """Rows."""
        return len(self.tokens)

    def seed(self, prompt: int) -> int:
        """Key of a row's sampling noise."""
        return 1000 + prompt


@torch.inference_mode()
def make_rollouts(
    model: Any,
    prompts: np.ndarray,
    *,
    num_tokens: int,
    spare: int,
    tap_ids: tuple[int, ...],
    temperature: float = 0.0,
) -> Rollouts:
    """Continues prompts ``[P, prompt_tokens]`` with a `transformers` model, greedily or with the engine's noise."""
    vocabulary = torch.arange(model.config.vocab_size)
    seeds = torch.arange(len(prompts))[:, None] + 1000

    def choose(logits: torch.Tensor, position: int) -> torch.Tensor:
        noise = gumbel_noise(seeds, torch.tensor(position), vocabulary)
        return (logits.double() / temperature + noise).argmax(-1)

    total = 1 + num_tokens + spare
    tokens = continue_prompts(model, prompts, total, choose=choose if temperature > 0 else None)
    ids = torch.from_numpy(tokens)
    taps = []
    for rows in ids.split(16):
        states = model.model(input_ids=rows, use_cache=False, output_hidden_states=True).hidden_states
        taps.append(torch.cat([states[t + 1] for t in tap_ids], -1).float())
    return Rollouts(
        tokens=ids,
        prompt_tokens=prompts.shape[1],
        num_tokens=num_tokens,
        temperature=temperature,
        tap_ids=tap_ids,
        taps=torch.cat(taps),
        embedding=model.get_input_embeddings().weight.float(),
        output=model.lm_head.weight.float(),
    )


@torch.inference_mode()
def head_logits(head: TrainableHead, rollouts: Rollouts, prompt: int) -> torch.Tensor:
    """fp32 ``[num_tokens, D, V]``: what the head says when anchored at each walked token of one prompt."""
    if head.config.target_layer_ids != rollouts.tap_ids:
        raise ValueError(f"the head reads layers {head.config.target_layer_ids}, tapped were {rollouts.tap_ids}")
    begin = rollouts.prompt_tokens
    anchors = torch.arange(begin, begin + rollouts.num_tokens)[None]
    taps = rollouts.taps[prompt : prompt + 1, : begin + rollouts.num_tokens]
    size = head.config.block_size
    ids = torch.full((1, rollouts.num_tokens, size), head.config.mask_token_id)
    ids[:, :, 0] = rollouts.tokens[prompt, begin : begin + rollouts.num_tokens]
    angles = head.angles(taps.shape[1] + size)
    hidden = head(taps, rollouts.embedding[ids], anchors, torch.zeros(1, dtype=torch.int64), angles)
    return hidden[0] @ rollouts.output.T


def tables_along(
    logits: torch.Tensor,
    rollouts: Rollouts,
    prompt: int,
    *,
    width: int,
    coupled: bool = False,
    sidecar: Correction | None = None,
    sharpness: float = 1.0,
) -> list[CandidateTable]:
    """A candidate table for every anchor of one prompt, from `head_logits`."""
    begin = rollouts.prompt_tokens
    anchors = rollouts.tokens[prompt, begin : begin + rollouts.num_tokens].tolist()
    sampling: list[DraftSampling | None] = [None] * len(anchors)
    if coupled:
        sampling = [
            DraftSampling(temperature=rollouts.temperature, seed=rollouts.seed(prompt), anchor_position=begin + i)
            for i in range(len(anchors))
        ]
    found: list[CandidateTable] = []
    for i in range(0, len(anchors), 64):
        part = slice(i, i + 64)
        found += candidate_tables(
            logits[part],
            width=width,
            anchor_ids=anchors[part],
            sampling=sampling[part],
            sidecar=sidecar,
            sharpness=sharpness,
        )
    return found


@dataclass(kw_only=True)
class Acceptance:
    """What a drafter reached with trees of several sizes."""

    #: Nodes per tree, the root included.
    budgets: tuple[int, ...]
    #: Tokens per step with the bonus, fp64 ``[P, budgets]``.
    per_prompt: np.ndarray
    #: Steps by number of accepted guesses, int64 ``[budgets, depths + 1]``.
    steps_by_depth: np.ndarray

    def mean(self) -> list[float]:
        """Tokens per step, averaged over prompts."""
        return [float(x) for x in self.per_prompt.mean(0)]

    def standard_error(self) -> list[float]:
        """Over prompts."""
        return [float(x) for x in self.per_prompt.std(0, ddof=1) / np.sqrt(len(self.per_prompt))]

    def reached(self) -> list[list[float]]:
        """Per budget, the share of steps in which at least 1, 2, ... guesses were accepted."""
        counts = self.steps_by_depth[:, ::-1].cumsum(1)[:, ::-1]
        return [[float(x) for x in row[1:] / row[0]] for row in counts]


def walk(
    rollouts: Rollouts,
    draft: Callable[[int, int, int], DraftTree],
    budgets: Sequence[int],
    *,
    prefix_free: bool = False,
) -> Acceptance:
    """Steps through all texts with trees of each size.

    Args:
        rollouts: the texts.
        draft: prompt, index of the anchor among the walked tokens, and budget to a tree. Best-first trees are
            asked for at the largest budget only, and their first nodes taken.
        budgets: nodes per tree.
        prefix_free: ask for every budget instead, for trees whose first nodes are not the smaller tree.
    """
    memory: dict[tuple[int, int, int], dict[tuple[int, int], int]] = {}
    largest = max(budgets)
    depth = rollouts.tokens.shape[1] - rollouts.prompt_tokens - rollouts.num_tokens
    per_prompt = np.zeros((rollouts.num_prompts, len(budgets)))
    counts = np.zeros((len(budgets), depth + 1), dtype=np.int64)
    for p in range(rollouts.num_prompts):
        text = rollouts.tokens[p, rollouts.prompt_tokens :].tolist()
        for b, budget in enumerate(budgets):
            at = steps = 0
            asked = budget if prefix_free else largest
            while at < rollouts.num_tokens:
                key = (p, at, asked)
                children = memory.get(key)
                if children is None:
                    children = memory[key] = draft(p, at, asked).children_by_token()
                node = accepted = 0
                while accepted < depth:
                    child = children.get((node, text[at + accepted + 1]))
                    if child is None or child >= budget:
                        break
                    node, accepted = child, accepted + 1
                counts[b, accepted] += 1
                steps += 1
                at += accepted + 1
            per_prompt[p, b] = at / steps
        memory.clear()
    return Acceptance(budgets=tuple(budgets), per_prompt=per_prompt, steps_by_depth=counts)
