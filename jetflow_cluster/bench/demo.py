"""`jetflow demo`, part speed: held-out prompts completed token by token and with tree speculation, live, with proof."""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.near_ties import NEAR_TIE, first_difference, greedy_gap
from jetflow_cluster.bench.prompts import BenchPrompt, load_prompts
from jetflow_cluster.bench.report import load_pyplot, write_json
from jetflow_cluster.bench.terminal import GUESSED_STYLE, Streamed, stream_to
from jetflow_cluster.bench.trace import record_trace, trace_page
from jetflow_cluster.config import DEFAULT_MAX_TREE_NODES
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

#: Lines of a prompt that are shown.
_SHOWN_LINES = 8


class OutputsDifferError(RuntimeError):
    """Speculation changed an output where the target had no near-tie."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything that decides a demonstration."""

    #: Where ``results.json``, the pictures and the tree page go.
    output_dir: Path
    #: Target checkpoint; None is the embedded default.
    model: str | None = None
    #: Draft head; None is the embedded one for the embedded default.
    draft_head: str | None = None
    #: File of prompts; None is the held-out ones of the embedded default.
    prompts: Path | None = None
    #: How many prompts.
    num_prompts: int = 6
    #: Output tokens of each at most.
    max_tokens: int = 96
    #: Compute type; in fp32 outputs may part only at near-ties, and those are reported.
    dtype: str = "float32"
    #: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """One prompt completed in both ways."""

    prompt: BenchPrompt
    plain: Streamed
    tree: Streamed

    @property
    def ratio(self) -> float:
        """How many times faster the tree was."""
        return self.tree.tokens_per_s / self.plain.tokens_per_s


def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Runs the demonstration and returns the content of ``results.json``.

    Raises:
        OutputsDifferError: an output changed, and the target had no near-tie there.
        FileNotFoundError: checkpoint or prompts are not there.
    """
    with console.status("loading the model and measuring what trees pay here"):
        llm = LLM(
            config.model,
            config.draft_head,
            dtype=config.dtype,
            device=config.device,
            enable_prefix_cache=False,
            max_num_requests=1,
        )
        longest = llm.max_model_len - config.max_tokens
        prompts = load_prompts(
            config.prompts, llm.tokenizer, max_prompts=config.num_prompts, max_prompt_tokens=min(256, longest)
        )
        _complete(llm, prompts[0], config, SpeculationMode.AUTO, Console(file=io.StringIO()))
    pairs, near_ties = [], []
    for i, prompt in enumerate(prompts):
        pair = _complete_both(llm, prompt, config, console, index=i, count=len(prompts))
        near_ties += _check_same(config, pair, console)
        pairs.append(pair)
    results = _results(config, llm, pairs, near_ties)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(results, config.output_dir / "results.json")
    _draw(pairs, config.output_dir)
    if llm.engine.drafter is not None:
        (config.output_dir / "trees.html").write_text(_tree_page(llm, prompts[0], config), encoding="utf-8")
    console.print(Rule(style="dim"))
    console.print(_table(pairs, results))
    return results


def _complete_both(
    llm: LLM, prompt: BenchPrompt, config: DemoConfig, console: Console, *, index: int, count: int
) -> _Pair:
    console.print(Rule(f"{index + 1} of {count}: {prompt.name}", style="dim", align="left"))
    lines = prompt.text.rstrip("\n").splitlines()
    console.print("\n".join(lines[-_SHOWN_LINES:]), style="dim", markup=False, highlight=False)
    modes = [(SpeculationMode.OFF, "token by token"), (SpeculationMode.AUTO, "tree speculation")]
    done: dict[SpeculationMode, Streamed] = {}
    # Taking turns in changing order keeps a warming or throttling processor from favouring one of them.
    for mode, title in modes if index % 2 == 0 else reversed(modes):
        console.print(f"[bold]{title}[/bold]")
        done[mode] = streamed = _complete(llm, prompt, config, mode, console)
        length = streamed.mean_acceptance_length
        console.print(f"\n[dim]{streamed.tokens_per_s:.0f} tokens/s, {length:.2f} tokens per pass[/dim]")
    return _Pair(prompt=prompt, plain=done[SpeculationMode.OFF], tree=done[SpeculationMode.AUTO])


def _complete(llm: LLM, prompt: BenchPrompt, config: DemoConfig, mode: SpeculationMode, console: Console) -> Streamed:
    params = SamplingParams(temperature=0.0, max_tokens=config.max_tokens, speculation=SpeculationOptions(mode=mode))
    return stream_to(console, llm, prompt.token_ids, params, coloured=mode is not SpeculationMode.OFF)


def _check_same(config: DemoConfig, pair: _Pair, console: Console) -> list[dict[str, Any]]:
    """Nothing when the outputs are equal; the place when they part at a near-tie; an error otherwise."""
    at = first_difference(pair.plain.token_ids, pair.tree.token_ids)
    if at is None:
        console.print("[green]outputs identical[/green]\n")
        return []
    gap = greedy_gap(config.model, [*pair.prompt.token_ids, *pair.plain.token_ids[:at]], device=config.device)
    if gap >= NEAR_TIE:
        raise OutputsDifferError(
            f"{pair.prompt.name}: outputs differ from token {at} on, where the best two tokens are {gap:.2g} apart"
        )
    console.print(f"[yellow]outputs part at token {at}, a near-tie: the best two tokens are {gap:.1g} apart[/yellow]\n")
    return [{"prompt": pair.prompt.name, "token": at, "gap": gap}]


def _results(config: DemoConfig, llm: LLM, pairs: Sequence[_Pair], near_ties: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for name, runs in (("off", [p.plain for p in pairs]), ("auto", [p.tree for p in pairs])):
        ratios = [1.0 if name == "off" else pair.ratio for pair in pairs]
        rows.append(
            {
                "name": name,
                "tokens_per_s": round(statistics.median(run.tokens_per_s for run in runs), 2),
                "ratio_to_off": round(statistics.median(ratios), 4),
                "mean_acceptance_length": round(statistics.fmean(run.mean_acceptance_length for run in runs), 4),
                "num_tokens": sum(len(run.token_ids) for run in runs),
            }
        )
    return {
        "machine": describe_machine(),
        "model": config.model or "embedded default",
        "dtype": config.dtype,
        "num_different_outputs": len(near_ties),
        "near_ties": near_ties,
        "rows": rows,
        "prompts": [
            {
                "name": pair.prompt.name,
                "num_tokens": len(pair.tree.token_ids),
                "off_tokens_per_s": round(pair.plain.tokens_per_s, 2),
                "auto_tokens_per_s": round(pair.tree.tokens_per_s, 2),
                "ratio_to_off": round(pair.ratio, 4),
                "mean_acceptance_length": round(pair.tree.mean_acceptance_length, 4),
                "text": pair.tree.text,
            }
            for pair in pairs
        ],
    }


def _table(pairs: Sequence[_Pair], results: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, footer_style="bold", show_footer=True)
    off, auto = results["rows"]
    table.add_column("prompt", footer="median")
    table.add_column("token by token", f"{off['tokens_per_s']:.0f} tok/s", justify="right")
    table.add_column("tree speculation", f"{auto['tokens_per_s']:.0f} tok/s", justify="right", style=GUESSED_STYLE)
    table.add_column("ratio", f"{auto['ratio_to_off']:.2f}x", justify="right")
    table.add_column("tokens per pass", f"{auto['mean_acceptance_length']:.2f}", justify="right")
    same = "all" if not results["near_ties"] else f"all but {len(results['near_ties'])} near-ties"
    table.add_column("identical", same, justify="right")
    for pair in pairs:
        table.add_row(
            pair.prompt.name,
            f"{pair.plain.tokens_per_s:.0f} tok/s",
            f"{pair.tree.tokens_per_s:.0f} tok/s",
            f"{pair.ratio:.2f}x",
            f"{pair.tree.mean_acceptance_length:.2f}",
            "yes" if pair.plain.token_ids == pair.tree.token_ids else "near-tie",
        )
    return table


def _tree_page(llm: LLM, prompt: BenchPrompt, config: DemoConfig) -> str:
    options = SpeculationOptions(mode=SpeculationMode.FORCE, max_tree_nodes=DEFAULT_MAX_TREE_NODES)
    params = SamplingParams(temperature=0.0, max_tokens=config.max_tokens, speculation=options)
    return trace_page(record_trace(llm, prompt.token_ids, params))


def _draw(pairs: Sequence[_Pair], folder: Path) -> None:
    plt = load_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.45 * len(pairs) + 2.2), width_ratios=[3, 2])
    places = range(len(pairs))
    left.barh([p - 0.19 for p in places], [p.plain.tokens_per_s for p in pairs], 0.36, color="#9aa5b1")
    bars = left.barh([p + 0.19 for p in places], [p.tree.tokens_per_s for p in pairs], 0.36, color="#0b7a75")
    left.bar_label(bars, labels=[f" {pair.ratio:.2f}x" for pair in pairs], fontsize=8)
    left.set_yticks(list(places), [_short(pair.prompt.name) for pair in pairs])
    left.invert_yaxis()
    left.margins(x=0.12)
    left.set_title("tokens per second: token by token (grey), tree speculation (green)", loc="left", fontsize=10)
    counts = Counter(accepted + 1 for pair in pairs for accepted in pair.tree.accepted_per_step[1:])
    lengths = range(1, max(counts, default=1) + 1)
    right.bar(list(lengths), [counts[length] for length in lengths], color="#0b7a75")
    right.set_xticks(list(lengths))
    right.set_xlabel("tokens in one pass of the target")
    right.set_ylabel("passes")
    right.set_title("what a pass was worth", loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(folder / "demo.png", dpi=140)
    plt.close(figure)


def _short(name: str, limit: int = 40) -> str:
    return name if len(name) <= limit else "\u2026" + name[1 - limit :]
