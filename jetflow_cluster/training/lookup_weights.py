"""Fits how much a guess from a request's own text is worth beside the draft head's (`tree/lookup.py`)."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import numpy as np
import torch

from jetflow_cluster.training.distill import DistillConfig
from jetflow_cluster.training.evaluate import read_sidecar
from jetflow_cluster.training.head_model import load_head
from jetflow_cluster.training.regenerate import load_causal_lm, read_streams, windows
from jetflow_cluster.training.simulate import Rollouts, head_logits, make_rollouts, tables_along
from jetflow_cluster.tree.build import SCORE_UNIT, CandidateTable
from jetflow_cluster.tree.lookup import LOOKUP_WEIGHTS, MATCH_BOUNDS, MAX_LOOKUP_DEPTH, ContextIndex, ContextMatch

_PROMPT_TOKENS, _NUM_TOKENS = 128, 96
_WIDTH = 15
_ROUNDS = 100


def fit_lookup_weights(config: DistillConfig, head_dir: Path, *, num_prompts: int = 240) -> list[list[float]]:
    """The table `LOOKUP_WEIGHTS`, from greedy texts behind random windows of the validation files.

    Each weight maximizes the likelihood of what came under ``(1 - weight) * candidates + weight * guess``
    (expectation maximization), over all places where the guesses above it were right.
    """
    head, sidecar = load_head(head_dir), read_sidecar(head_dir)
    streams = read_streams(config.source, config.target, "validation") or []
    prompts = windows([(streams[0][0], 1.0)], num_prompts, _PROMPT_TOKENS, 11)
    rollouts = make_rollouts(
        load_causal_lm(config.target, torch.float32),
        prompts.astype(np.int64),
        num_tokens=_NUM_TOKENS,
        spare=MAX_LOOKUP_DEPTH,
        tap_ids=head.config.target_layer_ids,
    )
    seen: dict[tuple[int, int], list[tuple[float, bool]]] = {}
    for p in range(rollouts.num_prompts):
        tables = tables_along(
            head_logits(head, rollouts, p),
            rollouts,
            p,
            width=_WIDTH,
            sidecar=sidecar.correction if sidecar is not None else None,
        )
        _note(rollouts, p, tables, seen)
    num_columns = len(LOOKUP_WEIGHTS[0])
    return [[_weight(seen.get((r, d), [])) for d in range(num_columns)] for r in range(len(MATCH_BOUNDS))]


def _note(
    rollouts: Rollouts, prompt: int, tables: list[CandidateTable], seen: dict[tuple[int, int], list[tuple[float, bool]]]
) -> None:
    """Adds, for each guess that is asked about, the head's probability of it and whether it was right."""
    index, text = ContextIndex(), rollouts.tokens[prompt].tolist()
    for at, table in enumerate(tables):
        end = rollouts.prompt_tokens + at + 1
        match = index.match(text[:end], MAX_LOOKUP_DEPTH)
        if match is None:
            continue
        row = bisect_right(MATCH_BOUNDS, match.length) - 1
        for d, (share, guess) in enumerate(zip(_shares(table, match), match.token_ids, strict=True)):
            is_right = text[end + d] == guess
            seen.setdefault((row, min(d, len(LOOKUP_WEIGHTS[0]) - 1)), []).append((share, is_right))
            if not is_right:
                break


def _shares(table: CandidateTable, match: ContextMatch) -> list[float]:
    """The head's probability of each guess behind the one above; 0 where it has none."""
    shares = []
    above: int | None = 0
    for d, guess in enumerate(match.token_ids):
        places = (table.ids[d] == guess).nonzero().flatten().tolist() if d < len(table.ids) else []
        share = 0.0
        if places:
            scores = table.scores[d, :, places[0]].double() / SCORE_UNIT
            of_parent = scores.exp().mean() if above is None else scores[min(above, len(scores) - 1)].exp()
            share = float(of_parent)
        shares.append(share)
        above = places[0] if places else None
    return shares


def _weight(seen: list[tuple[float, bool]]) -> float:
    shares = np.array([share for share, _ in seen])
    is_right = np.array([right for _, right in seen], dtype=bool)
    weight = 0.3
    for _ in range(_ROUNDS):
        by_guess = np.where(is_right, weight / np.maximum(weight + (1 - weight) * shares, 1e-9), 0.0)
        # Half a success and half a failure stand for what was not seen.
        weight = float((by_guess.sum() + 0.5) / (len(seen) + 1))
    return round(weight, 3)
