"""Trains variants of the head for the same time each and compares them on validation prompts.

Run as ``python -m jetflow_cluster.training.ablation --help``.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jetflow_cluster.training.distill import DistillConfig, distill, prepare
from jetflow_cluster.training.head_model import load_head
from jetflow_cluster.training.plots import plot_ablation
from jetflow_cluster.training.regenerate import load_causal_lm, read_streams, windows
from jetflow_cluster.training.simulate import Rollouts, head_logits, make_rollouts, tables_along, walk
from jetflow_cluster.tree.build import build_trees

NODES = (16, 32)

#: Name to what differs from the first, each alone.
VARIANTS: dict[str, dict[str, Any]] = {
    "2 layers, warm start, Muon, block 8, decay 4": {},
    "1 layer": {"num_layers": 1},
    "random start": {"warm_start": False},
    "AdamW": {"optimizer": "adamw", "learning_rates": (1.5e-3, 1.5e-3)},
    "block 16": {"block_size": 16, "num_anchors": 32},
    "no decay": {"gamma": None},
    "accept until fail, no decay": {"gamma": None, "accept_until_fail": True},
    "AdamW, random start": {"optimizer": "adamw", "learning_rates": (1.5e-3, 1.5e-3), "warm_start": False},
    "AdamW at 3e-3": {"optimizer": "adamw", "learning_rates": (3e-3, 3e-3)},
}


def ablate(base: DistillConfig, variants: dict[str, dict[str, Any]], *, num_prompts: int = 64) -> list[dict[str, Any]]:
    """Trains and measures every variant that is not done yet.

    Args:
        base: of all variants; the time of each is its `max_minutes`, and all share its training sequences.
        variants: name to the fields that differ.
        num_prompts: validation prompts of the comparison, 64 tokens each.

    Returns:
        Rows with ``name``, ``changes``, ``acceptance`` and ``standard_error`` (by nodes), ``top1_by_depth``,
        ``steps``. Writes them to ``ablation.json``, with ``ablation.md`` and ``ablation.png`` beside it.
    """
    rows = []
    base = replace(base, data_dir=base.sequences_dir)
    for name, changes in variants.items():
        config = replace(base, **changes, output_dir=base.output_dir / re.sub(r"[^a-z0-9]+", "-", name.lower()))
        done = config.output_dir / "row.json"
        if not done.exists():
            Console().rule(name)
            folder = distill(config)
            row = {"name": name, "changes": _plain(changes)} | measure(config, folder, num_prompts)
            row["minutes"] = config.max_minutes
            log = (config.output_dir / "distill.csv").read_text().splitlines()[-1].split(",")
            row |= {"steps": int(log[0]), "blocks": int(log[1])}
            done.write_text(json.dumps(row, indent=1))
        rows.append(json.loads(done.read_text()))
        _write(base.output_dir, rows)
    return rows


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}


def measure(config: DistillConfig, folder: Path, num_prompts: int) -> dict[str, Any]:
    """Acceptance of exact trees with marginal scores, and top-1 per depth, on validation prompts."""
    head = load_head(folder)
    if config.source.is_dir():
        library = (read_streams(config.source, config.target, "validation") or [])[0][0]
        prompts = windows([(library, 1.0)], num_prompts, config.prompt_tokens, 11)
    else:
        made = prepare(config)[0]
        last = made.num_regenerated
        prompts = made.tokens[max(0, last - config.num_held_out) : last, : config.prompt_tokens]
    depth = head.config.block_size - 1
    model = load_causal_lm(config.target, torch.float32)
    texts = make_rollouts(model, prompts, num_tokens=64, spare=15, tap_ids=head.config.target_layer_ids)
    tables, right = [], torch.zeros(depth)
    for p in range(texts.num_prompts):
        logits = head_logits(head, texts, p)
        tables.append(tables_along(logits, texts, p, width=NODES[0] - 1))
        right = right + _right(logits, texts, p) / texts.num_prompts
    found = walk(
        texts,
        lambda p, at, n: build_trees([tables[p][at]], [0], max_nodes=[n], max_depths=[depth])[0],
        NODES,
    )
    names = [str(n) for n in NODES]
    return {
        "acceptance": dict(zip(names, found.mean(), strict=True)),
        "standard_error": dict(zip(names, found.standard_error(), strict=True)),
        "top1_by_depth": [round(float(x), 4) for x in right],
    }


def _right(logits: torch.Tensor, texts: Rollouts, prompt: int) -> torch.Tensor:
    at = texts.prompt_tokens + torch.arange(texts.num_tokens)[:, None] + torch.arange(1, logits.shape[1] + 1)
    return (logits.argmax(-1) == texts.tokens[prompt][at]).float().mean(0)


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "ablation.json").write_text(json.dumps(rows, indent=1))
    lines = ["| variant | steps | top-1 at depth 1 | at depth 4 | 16 nodes | 32 nodes |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row['acceptance'][str(n)]:.2f} ± {row['standard_error'][str(n)]:.2f}" for n in NODES]
        top = row["top1_by_depth"]
        lines.append(f"| {row['name']} | {row['steps']} | {top[0]:.3f} | {top[3]:.3f} | {cells[0]} | {cells[1]} |")
    (folder / "ablation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_ablation(rows, folder / "ablation.png")


def main() -> None:
    """The variants of the embedded default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train-dir", type=Path, default=Path("build/train"), help="folder of `make train`")
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of each variant")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the variants to run")
    arguments = parser.parse_args()
    folder: Path = arguments.train_dir
    base = DistillConfig(
        target=folder / "target",
        source=folder / "corpus",
        output_dir=folder / "ablation",
        data_dir=folder / "data",
        optimizer="muon",
        max_minutes=arguments.minutes,
        measure_every_minutes=100,
    )
    names = list(VARIANTS)
    chosen = names if arguments.only is None else [names[i] for i in arguments.only]
    ablate(base, {name: VARIANTS[name] for name in chosen})


if __name__ == "__main__":
    main()
