"""Fits the few numbers that scale guesses, on texts that neither head nor side-car was trained on."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jetflow_cluster.models.sidecar import CONFIG_NAME
from jetflow_cluster.training.distill import DistillConfig, held_out_rollouts
from jetflow_cluster.training.evaluate import read_sidecar
from jetflow_cluster.training.head_model import load_head
from jetflow_cluster.training.regenerate import Sequences
from jetflow_cluster.training.simulate import Rollouts, head_logits, tables_along, walk
from jetflow_cluster.tree.build import SCORE_UNIT, CandidateTable, build_trees
from jetflow_cluster.tree.lookup import LOOKUP_WEIGHTS, MATCH_BOUNDS, MAX_LOOKUP_DEPTH, ContextIndex, ContextMatch

#: Among these the sharpness of greedy guesses is chosen.
SHARPNESS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.6)
#: Nodes of the trees by which it is chosen.
_NODES = 32
_WIDTH = 16
_ROUNDS = 100


def calibration_rollouts(config: DistillConfig, *, num_prompts: int = 240) -> Rollouts:
    """Greedy texts of the target behind prompts that no training step saw."""
    if not config.source.is_dir():
        # Plain text has no validation files: rows that the head's training set aside.
        return held_out_rollouts(config, Sequences(config.sequences_dir), spare=MAX_LOOKUP_DEPTH)
    wanted = replace(config, num_held_out=num_prompts, prompt_tokens=128, held_out_tokens=96)
    return held_out_rollouts(wanted, None, spare=MAX_LOOKUP_DEPTH)


def fit_sharpness(head_dir: Path, rollouts: Rollouts) -> float:
    """The exponent of greedy guesses beside a side-car that yields the longest acceptance; written to its config.

    A head that guesses a depth without knowing the token before spreads over what may follow any of them. Behind one
    of them, which the side-car knows, the guess is sharper.
    """
    head, sidecar = load_head(head_dir), read_sidecar(head_dir)
    if sidecar is None:
        raise ValueError(f"{head_dir} holds no side-car")
    tables: dict[float, list[list[CandidateTable]]] = {sharpness: [] for sharpness in SHARPNESS}
    for p in range(rollouts.num_prompts):
        logits = head_logits(head, rollouts, p)
        for sharpness, found in tables.items():
            found.append(tables_along(logits, rollouts, p, width=_WIDTH, sidecar=sidecar, sharpness=sharpness))
    lengths = {}
    for sharpness, found in tables.items():

        def draft(p: int, at: int, nodes: int, found: Any = found) -> Any:
            return build_trees([found[p][at]], [0], max_nodes=[nodes], max_depths=[head.config.block_size - 1])[0]

        lengths[sharpness] = walk(rollouts, draft, (_NODES,)).mean()[0]
    best = max(lengths, key=lengths.__getitem__)
    path = head_dir / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sharpness": best}, indent=1))
    return best


def fit_lookup_weights(head_dir: Path, rollouts: Rollouts) -> list[list[float]]:
    """The table `LOOKUP_WEIGHTS`.

    Each weight maximizes the likelihood of what came under ``(1 - weight) * candidates + weight * guess``
    (expectation maximization), over all places where the guesses above it were right.
    """
    head, sidecar = load_head(head_dir), read_sidecar(head_dir)
    seen: dict[tuple[int, int], list[tuple[float, bool]]] = {}
    for p in range(rollouts.num_prompts):
        tables = tables_along(
            head_logits(head, rollouts, p),
            rollouts,
            p,
            width=_WIDTH,
            sidecar=sidecar,
            sharpness=sidecar.config.sharpness if sidecar is not None else 1.0,
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
