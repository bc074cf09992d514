"""Compares drafters by the tokens per step that they would reach, on texts that the target wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from jetflow_cluster.models.sidecar import CONFIG_NAME, WEIGHTS_NAME, SideCar, SideCarConfig
from jetflow_cluster.training.head_model import TrainableHead, load_head
from jetflow_cluster.training.plots import plot_acceptance
from jetflow_cluster.training.regenerate import load_causal_lm, load_tokenizer
from jetflow_cluster.training.simulate import Acceptance, Rollouts, head_logits, make_rollouts, tables_along, walk
from jetflow_cluster.tree.build import CandidateTable, build_trees
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.tree.lookup import MAX_LOOKUP_DEPTH, ContextIndex, mix_lookup

_FULL_WIDTH = 7
_LOOKUP_NGRAM, _LOOKUP_TOKENS = 3, 15
_MIXED = "context lookup"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is compared."""

    #: Folder of the target checkpoint.
    target: Path
    #: Folder of the head, its side-car beside it when there is one.
    head: Path
    #: JSON list of prompts with ``text``; those shorter than `prompt_tokens` are left out.
    prompts: Path
    #: Folder for ``acceptance.json`` and ``acceptance.png``.
    output_dir: Path
    #: A bidirectional head that was trained alike, for comparison.
    bidirectional_head: Path | None = None
    #: Prompts, tokens of each, and tokens that are walked behind each.
    num_prompts: int = 120
    prompt_tokens: int = 128
    num_tokens: int = 96
    #: Nodes per tree, roots included.
    budgets: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    #: 0 is greedy; others are sampled with known noise.
    temperatures: tuple[float, ...] = (0.0, 1.0)
    #: Candidates per depth, as in the engine: at most this, and one fewer than nodes.
    width: int = 16


def read_sidecar(head_dir: Path) -> SideCar | None:
    """The side-car beside a head, unchecked; None when there is none."""
    if not (head_dir / CONFIG_NAME).exists():
        return None
    raw = json.loads((head_dir / CONFIG_NAME).read_text())
    tensors = load_file(head_dir / WEIGHTS_NAME)
    config = SideCarConfig(**raw)
    return SideCar(config, tensors["parent.weight"].float(), tensors["child.weight"].float())


def read_prompts(path: Path, target: Path, *, num_prompts: int, prompt_tokens: int) -> np.ndarray:
    """int64 ``[P, prompt_tokens]``: the first tokens of each text. Raises ValueError when none is long enough."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    texts = [e if isinstance(e, str) else e["text"] for e in entries]
    ids = [e.ids[-prompt_tokens:] for e in load_tokenizer(target).encode_batch(texts)]
    ids = [one for one in ids if len(one) == prompt_tokens][:num_prompts]
    if not ids:
        raise ValueError(f"{path} holds no prompt of {prompt_tokens} tokens")
    return np.array(ids, dtype=np.int64)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures every row; returns what was written to ``acceptance.json``."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    console = Console()
    heads = {"causal": load_head(config.head)}
    if config.bidirectional_head is not None:
        heads["bidirectional"] = load_head(config.bidirectional_head)
    main = heads["causal"]
    sidecar = read_sidecar(config.head)
    prompts = read_prompts(
        config.prompts, config.target, num_prompts=config.num_prompts, prompt_tokens=config.prompt_tokens
    )
    model = load_causal_lm(config.target, torch.float32)
    rows: list[dict[str, Any]] = []
    top1: dict[str, dict[str, list[float]]] = {}
    for temperature in config.temperatures:
        texts = make_rollouts(
            model,
            prompts,
            num_tokens=config.num_tokens,
            spare=max(_LOOKUP_TOKENS, MAX_LOOKUP_DEPTH, main.config.block_size - 1),
            tap_ids=main.config.target_layer_ids,
            temperature=temperature,
        )
        console.print(f"temperature {temperature:g}: texts are there")
        found = _Comparison(config, texts, heads, sidecar, console)
        rows += found.rows()
        top1[f"{temperature:g}"] = {name: found.top1(name) for name in heads}
    result = {
        "target": str(config.target),
        "head": str(config.head),
        "num_prompts": len(prompts),
        "prompt_tokens": config.prompt_tokens,
        "num_tokens": config.num_tokens,
        "rows": rows,
        "top1_by_depth": top1,
    }
    (config.output_dir / "acceptance.json").write_text(json.dumps(result, indent=1))
    panels = {
        ("greedy" if t == 0 else f"temperature {t:g}"): [r for r in rows if r["temperature"] == t]
        for t in config.temperatures
    }
    plot_acceptance(panels, config.output_dir / "acceptance.png")
    (config.output_dir / "acceptance.md").write_text(markdown(result, config.budgets), encoding="utf-8")
    console.print(_shown(result, config.budgets))
    return result


class _Comparison:
    """All rows at one temperature."""

    def __init__(
        self,
        config: EvaluateConfig,
        texts: Rollouts,
        heads: dict[str, TrainableHead],
        sidecar: SideCar | None,
        console: Console,
    ):
        self._config, self._texts, self._console = config, texts, console
        self._depth = heads["causal"].config.block_size - 1
        #: Row name -> width -> prompt -> anchor.
        self._tables: dict[tuple[str, int], list[list[CandidateTable]]] = {}
        self._top1: dict[str, list[torch.Tensor]] = {name: [] for name in heads}
        sampled = texts.temperature > 0
        self._variants: list[tuple[str, str, bool, bool]] = []
        for name in heads:
            label = "" if name == "causal" else " (bidirectional head)"
            self._variants.append((f"exact tree, marginal scores{label}", name, False, False))
            if sampled:
                self._variants.append((f"coupled tree, marginal scores{label}", name, True, False))
        if sidecar is not None:
            self._variants.append(("exact tree, side-car", "causal", False, True))
            if sampled:
                self._variants.append(("coupled tree, side-car", "causal", True, True))
        self._gather(heads, sidecar)

    def _widths(self) -> list[int]:
        return sorted({min(self._config.width, n - 1) for n in self._config.budgets})

    def _gather(self, heads: dict[str, TrainableHead], sidecar: SideCar | None) -> None:
        texts = self._texts
        is_greedy = texts.temperature == 0
        for p in range(texts.num_prompts):
            for name, head in heads.items():
                logits = head_logits(head, texts, p)
                self._top1[name].append(self._right(logits, p))
                for row, of_head, coupled, corrected in self._variants:
                    if of_head != name:
                        continue
                    for width in self._widths():
                        tables = tables_along(
                            logits,
                            texts,
                            p,
                            width=width,
                            coupled=coupled,
                            sidecar=sidecar if corrected else None,
                            sharpness=sidecar.config.sharpness if corrected and is_greedy and sidecar else 1.0,
                        )
                        self._tables.setdefault((row, width), []).append(tables)

    def _right(self, logits: torch.Tensor, prompt: int) -> torch.Tensor:
        texts = self._texts
        depths = torch.arange(1, logits.shape[1] + 1)
        at = texts.prompt_tokens + torch.arange(texts.num_tokens)[:, None] + depths
        return (logits.argmax(-1) == texts.tokens[prompt][at]).float().mean(0)

    def top1(self, name: str) -> list[float]:
        """Share of greedy guesses of a head that were right, per depth, over all anchors."""
        return [float(x) for x in torch.stack(self._top1[name]).mean(0)]

    def rows(self) -> list[dict[str, Any]]:
        """Every drafter of the comparison."""
        rows = [self._row("prompt lookup", [walk(self._texts, self._lookup, (_LOOKUP_TOKENS + 1,))])]
        plain = self._variants[0][0]
        chains = {"chain": plain, "chain, side-car": "exact tree, side-car"}
        chains |= {"coupled chain, side-car": "coupled tree, side-car"}
        widest = self._widths()[-1]
        for name, source in chains.items():
            if (source, widest) in self._tables:
                tables = self._tables[source, widest]
                nodes = self._depth + 1

                def chain(p: int, at: int, _: int, tables: Any = tables) -> DraftTree:
                    return chain_tree(tables[p][at])

                rows.append(self._row(name, [walk(self._texts, chain, (nodes,))]))
        full = self._tables[plain, widest]
        if self._texts.temperature == 0:
            draft = lambda p, at, n: full_width_tree(full[p][at], n)  # noqa: E731
            rows.append(self._row("full width 7", [walk(self._texts, draft, self._config.budgets, prefix_free=True)]))
        rows += [self._row(name, self._exact(name)) for name, *_ in self._variants]
        if self._texts.temperature == 0:
            best = self._variants[-1][0]
            self._tables |= {(_MIXED, width): self._with_lookup(self._tables[best, width]) for width in self._widths()}
            rows.append(self._row(f"{best}, context lookup", self._exact(_MIXED)))
        return rows

    def _with_lookup(self, tables: list[list[CandidateTable]]) -> list[list[CandidateTable]]:
        """As the engine mixes them."""
        found = []
        for p, of_prompt in enumerate(tables):
            index, text = ContextIndex(), self._texts.tokens[p].tolist()
            mixed = []
            for at, table in enumerate(of_prompt):
                match = index.match(text[: self._texts.prompt_tokens + at + 1], MAX_LOOKUP_DEPTH)
                mixed.append(table if match is None else mix_lookup(table, match))
            found.append(mixed)
        return found

    def _exact(self, name: str) -> list[Acceptance]:
        parts = []
        for width in self._widths():
            budgets = [n for n in self._config.budgets if min(self._config.width, n - 1) == width]
            tables = self._tables[name, width]

            def draft(p: int, at: int, nodes: int, tables: Any = tables) -> DraftTree:
                return build_trees([tables[p][at]], [0], max_nodes=[nodes], max_depths=[len(tables[p][at].ids)])[0]

            parts.append(walk(self._texts, draft, budgets))
        return parts

    def _lookup(self, prompt: int, at: int, nodes: int) -> DraftTree:
        history = self._texts.tokens[prompt, : self._texts.prompt_tokens + at + 1].tolist()
        return _chain([0, *prompt_lookup(history, nodes - 1)])

    def _row(self, name: str, parts: Sequence[Acceptance]) -> dict[str, Any]:
        self._console.print(name, highlight=False)
        return {
            "name": name,
            "temperature": self._texts.temperature,
            "budgets": [n for part in parts for n in part.budgets],
            "acceptance": [round(x, 4) for part in parts for x in part.mean()],
            "standard_error": [round(x, 4) for part in parts for x in part.standard_error()],
            "reached_by_depth": [[round(x, 4) for x in row] for part in parts for row in part.reached()],
        }


def _chain(token_ids: list[int]) -> DraftTree:
    num = len(token_ids)
    return DraftTree(token_ids=token_ids, parents=list(range(-1, num - 1)), depths=list(range(num)), scores=[0] * num)


def chain_tree(table: CandidateTable) -> DraftTree:
    """The best candidate of each depth, given the one chosen above it."""
    token_ids, rank = [0], 0
    for ids, scores in zip(table.ids, table.scores, strict=True):
        rank = int(scores[min(rank, scores.shape[0] - 1)].argmax())
        token_ids.append(int(ids[rank]))
    return _chain(token_ids)


def full_width_tree(table: CandidateTable, max_nodes: int, width: int = _FULL_WIDTH) -> DraftTree:
    """The published growth (arXiv 2606.18394, Algorithm 1): the best open node gets its `width` best children at once,
    until the nodes are used up. For comparison only; for marginal scores."""
    from heapq import heappop, heappush

    ids, scores = table.ids[:, :width].tolist(), table.scores[:, 0, :width].tolist()
    tree = DraftTree.root_only(0)
    heap = [(0, 0)]
    while heap and tree.num_nodes < max_nodes:
        negated, node = heappop(heap)
        depth = tree.depths[node]
        if depth == len(ids):
            continue
        for token, score in list(zip(ids[depth], scores[depth], strict=True))[: max_nodes - tree.num_nodes]:
            heappush(heap, (negated - score, tree.num_nodes))
            tree.token_ids.append(token)
            tree.parents.append(node)
            tree.depths.append(depth + 1)
            tree.scores.append(score - negated)
    return tree


def prompt_lookup(history: Sequence[int], num_tokens: int, ngram: int = _LOOKUP_NGRAM) -> list[int]:
    """What followed the latest earlier place that ends like `history`, by the longest ending up to `ngram` tokens."""
    for size in range(ngram, 0, -1):
        ending = list(history[-size:])
        for begin in range(len(history) - size - 1, -1, -1):
            if list(history[begin : begin + size]) == ending:
                return list(history[begin + size : begin + size + num_tokens])
    return []


def markdown(result: dict[str, Any], budgets: Sequence[int]) -> str:
    """The table of one evaluation; cells are tokens per step and their standard error."""
    lines = ["| temperature | drafter | " + " | ".join(map(str, budgets)) + " |", "|---|---|" + "---|" * len(budgets)]
    for name, temperature, cells in _cells(result, budgets):
        lines.append(f"| {temperature} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(result: dict[str, Any], budgets: Sequence[int]) -> list[tuple[str, str, list[str]]]:
    found = []
    for row in result["rows"]:
        values = dict(zip(row["budgets"], zip(row["acceptance"], row["standard_error"], strict=True), strict=True))
        cells = ["{:.2f} ± {:.2f}".format(*values[n]) if n in values else "" for n in budgets]
        found.append((row["name"], f"{row['temperature']:g}", cells))
    return found


def _shown(result: dict[str, Any], budgets: Sequence[int]) -> Table:
    table = Table("temperature", "drafter", *map(str, budgets), title="tokens per step by nodes")
    for name, temperature, cells in _cells(result, budgets):
        table.add_row(temperature, name, *cells)
    return table
