"""`jetflow doctor --costs`: what steps cost on this device, what guesses are worth, and what follows for each load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jetflow_cluster.bench.prompts import load_prompts
from jetflow_cluster.bench.report import load_pyplot
from jetflow_cluster.engine.cost_model import CostModel, StepShape
from jetflow_cluster.engine.draft_choice import NODES, Situation, choose, num_cohorts
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.engine.priced_budget import PricedBudget
from jetflow_cluster.types import SamplingParams, SpeculationOptions

#: Loads that the table tells of, and the prefix that each request is taken to have.
LOADS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT_TOKENS = 128
#: Held-out prompts that are completed for the reliability plot, and tokens of each.
_NUM_PROMPTS, _NUM_TOKENS = 12, 64


def examine_costs(llm: LLM) -> dict[str, Any]:
    """The measured model, the choice at each load, and the calibration after some held-out prompts, as JSON values.

    Raises:
        ValueError: the engine has no draft head, or its pool does not hold one request long enough to measure.
    """
    budget = llm.engine.scheduler.budget
    if not isinstance(budget, PricedBudget):
        raise ValueError("draft_head = None: costs are measured for engines that can speculate")
    cost = budget.cost
    rows = [_load_row(budget, cost, num, llm.max_model_len) for num in LOADS]
    prompts = load_prompts(None, llm.tokenizer, max_prompts=_NUM_PROMPTS, max_prompt_tokens=CONTEXT_TOKENS)
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature,
            max_tokens=_NUM_TOKENS,
            ignore_eos=True,
            seed=0,
            speculation=SpeculationOptions(mode="force"),
        )
        llm.generate([prompt.token_ids for prompt in prompts], params)
    budget.learning.catch_up()
    budget.learning.value.refresh()
    reliability = [
        {
            "sampled": entry.is_sampled,
            "depth": entry.depth,
            "num_seen": np.round(entry.num_seen, 1).tolist(),
            "said": np.round(entry.said, 4).tolist(),
            "happened": np.round(entry.happened, 4).tolist(),
            "calibrated": np.round(entry.calibrated, 4).tolist(),
        }
        for entry in budget.learning.value.reliability()
    ]
    return {
        "stored_in": str(llm.frontend.cost_store().path),
        "model": cost.to_dict(),
        "accepted_by_nodes": dict(zip(NODES, np.round(budget.gains.accepted[:, -1], 3).tolist(), strict=True)),
        "loads": rows,
        "reliability": reliability,
    }


def _load_row(budget: PricedBudget, cost: CostModel, num: int, max_len: int) -> dict[str, Any]:
    context = num * min(CONTEXT_TOKENS, max_len)
    shape = StepShape(num_requests=num, num_rows=num, num_context_tokens=context)
    situation = Situation(
        num_requests=num, num_context_tokens=context, num_prompt_rows=0, max_nodes=64, num_block_slots=None
    )
    best = choose(cost, budget.gains, np.ones(num), situation)
    cohorts = num_cohorts(
        cost, num_requests=num, num_nodes=best.num_nodes, depth=best.depth, num_context_tokens=context
    )
    return {
        "num_requests": num,
        "plain_step_ms": round(1e3 * cost.step_s(shape), 3),
        "draft_ms": round(1e3 * float(cost.drafting_s(num * (best.depth + 1), context)), 3),
        "num_nodes": best.num_nodes,
        "depth": best.depth,
        "num_drafted": best.num_drafted,
        "ratio": round(best.ratio, 3),
        "num_cohorts_dedicated": cohorts,
    }


def print_costs(report: dict[str, Any], console: Console) -> None:
    """Shows the table."""
    table = Table(title=f"costs and choices at {CONTEXT_TOKENS} tokens of prefix", title_justify="left")
    heads = ("requests", "step without, ms", "drafting, ms", "nodes", "depth", "expected ratio", "cohorts if dedicated")
    for head in heads:
        table.add_column(head, justify="right")
    for row in report["loads"]:
        names = ("num_requests", "plain_step_ms", "draft_ms", "num_nodes", "depth", "ratio", "num_cohorts_dedicated")
        table.add_row(*(str(row[name]) for name in names))
    console.print(table)
    console.print(f"kept in {report['stored_in']}")


def draw_costs(report: dict[str, Any], path: Path) -> None:
    """A PNG: cost curves, expected gains, and reliability."""
    plt = load_pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    model = report["model"]
    left.plot(model["row_knots"], [1e3 * s for s in model["row_s"]], "o-", label="target, by rows")
    left.plot(model["draft_knots"], [1e3 * s for s in model["draft_s"]], "s-", label="draft head, by its rows")
    left.set_xscale("log", base=2)
    left.set_xlabel("rows")
    left.set_title("milliseconds of a pass", loc="left")
    left.legend(fontsize=7)
    loads = report["loads"]
    middle.axhline(1.0, color="#9aa5b1", lw=0.8)
    middle.plot([row["num_requests"] for row in loads], [row["ratio"] for row in loads], "o-", color="#0b7a75")
    for row in loads:
        middle.annotate(str(row["num_nodes"]), (row["num_requests"], row["ratio"]), fontsize=7, va="bottom")
    middle.set_xscale("log", base=2)
    middle.set_xlabel("running requests (numbers: nodes per tree)")
    middle.set_title("expected tokens per second over none", loc="left")
    right.plot([0, 1], [0, 1], color="#9aa5b1", lw=0.8)
    for is_sampled, marker in ((False, "o"), (True, "^")):
        entries = [e for e in report["reliability"] if e["sampled"] is is_sampled]
        for name, color in (("said", "#c0504d"), ("calibrated", "#0b7a75")):
            said = [x for e in entries for x, n in zip(e[name], e["num_seen"], strict=True) if n >= 8]
            happened = [y for e in entries for y, n in zip(e["happened"], e["num_seen"], strict=True) if n >= 8]
            label = f"{'sampled' if is_sampled else 'greedy'}, {name}"
            right.scatter(said, happened, s=10, marker=marker, color=color, label=label)
    right.set_xlabel("probability foretold")
    right.set_title("share of guesses that were right", loc="left")
    right.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
