"""`jetflow bench ramp`: a load ramp across the crossing, replayed on a virtual clock with measured costs, or live."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from jetflow_cluster.bench.load.ramp import RampProfile, RampRun, RampVerdict, StepSeen, judge, run_ramp
from jetflow_cluster.bench.load.virtual_engine import GuessProfile, RampRequests, VirtualEngine
from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.prompts import BenchPrompt, load_prompts
from jetflow_cluster.bench.report import load_pyplot, write_json
from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.engine.local import LLM
from jetflow_cluster.engine.priced_budget import PricedBudget
from jetflow_cluster.engine.protocols import StepRecord
from jetflow_cluster.types import SamplingParams, SpeculationMode, SpeculationOptions

_WINDOW_S = 2.0
_SHOWN_WINDOWS = 12


@dataclass(frozen=True, kw_only=True)
class RampBenchConfig:
    """Everything that decides a replay, or a live ramp."""

    output_dir: Path
    profile: RampProfile = field(default_factory=RampProfile)
    requests: RampRequests = field(default_factory=RampRequests)
    guess: GuessProfile = field(default_factory=GuessProfile)
    #: File of a cost model, as `CostModel.to_json` writes it; None measures this machine.
    costs: Path | None = None
    model: str | None = None
    draft_head: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    #: Run the engine itself, in real time, in mode `auto`.
    live: bool = False


def measured_costs(llm: LLM) -> CostModel:
    """What the warm-up of an engine measured.

    Raises:
        ValueError: the engine measured nothing: it has no draft head, or too few pages.
    """
    budget = llm.engine.scheduler.budget
    if not isinstance(budget, PricedBudget):
        raise ValueError(f"model: its engine has no measured costs (policy {type(budget).__name__})")
    return budget.cost


def run_ramp_bench(config: RampBenchConfig, console: Console) -> dict[str, Any]:
    """Replays the ramp with `auto` and `off` for each seed; writes the files and returns ``results.json``."""
    if config.costs is not None:
        cost = CostModel.from_json(config.costs.read_text(encoding="utf-8"))
    else:
        with console.status("measuring what steps cost"):
            cost = measured_costs(_load(config))
    verdicts = []
    for seed in config.seeds:
        with console.status(f"replaying, seed {seed}"):
            runs = [
                run_ramp(
                    VirtualEngine(
                        mode,
                        cost,
                        guess=config.guess,
                        requests=config.requests,
                        max_num_requests=max(config.profile.levels),
                        seed=seed,
                    ),
                    config.profile,
                )
                for mode in (SpeculationMode.AUTO, SpeculationMode.OFF)
            ]
        verdicts.append(judge(runs[0], runs[1], window_s=_WINDOW_S))
    results = {
        "machine": describe_machine(),
        "kind": "virtual clock; scheduler and policy are the engine's, guesses are synthetic",
        "window_s": _WINDOW_S,
        "profile": asdict(config.profile),
        "requests": asdict(config.requests),
        "guess": asdict(config.guess),
        "cost_model": json.loads(cost.to_json()),
        "rows": [
            {
                "name": f"seed {seed}",
                "worst_ratio_to_off": round(v.worst_ratio, 4),
                "worst_ratio_of_separate_runs": round(v.worst_apart, 4),
                "num_turns": v.num_turns,
                "holds": v.holds,
                **{key: [round(x, 4) for x in getattr(v, key)] for key in ("auto", "off", "ratios", "nodes")},
            }
            for seed, v in zip(config.seeds, verdicts, strict=True)
        ],
    }
    write_json(results, config.output_dir / "results.json")
    draw_ramp(config.profile, verdicts, config.output_dir / "ramp.png")
    return results


def draw_ramp(profile: RampProfile, verdicts: Sequence[RampVerdict], path: Path) -> None:
    """Load, speeds, their ratio and tree sizes over time."""
    plt = load_pyplot()
    figure, axes = plt.subplots(4, 1, figsize=(9, 8.6), sharex=True)
    num = len(verdicts[0].auto)
    times = [(i + 0.5) * _WINDOW_S for i in range(num)]
    axes[0].step(times, [profile.at(t) for t in times], where="mid", color="#444444")
    axes[0].set_ylabel("requests")
    for i, verdict in enumerate(verdicts):
        labels = ("auto", "off") if i == 0 else (None, None)
        axes[1].plot(times, verdict.auto, color="#0b7a75", alpha=0.8, label=labels[0])
        axes[1].plot(times, verdict.off, color="#7f8c9a", alpha=0.8, label=labels[1])
        axes[2].plot(times, verdict.ratios, color="#0b7a75", alpha=0.8)
        axes[3].plot(times, verdict.nodes, color="#c2571a", alpha=0.8)
    axes[1].set_ylabel("tokens/s")
    axes[1].legend(frameon=False)
    axes[2].axhline(0.9, color="#a63d1f", linestyle="--", linewidth=1)
    axes[2].axhline(1.0, color="#999999", linewidth=0.8)
    axes[2].set_ylabel(f"auto to off, same requests,\n{_WINDOW_S:g} s windows")
    axes[3].set_ylabel("nodes per tree")
    axes[3].set_xlabel("seconds of the virtual clock")
    for panel in axes:
        panel.grid(alpha=0.25)
    worst = min(verdict.worst_ratio for verdict in verdicts)
    turns = max(verdict.num_turns for verdict in verdicts)
    axes[0].set_title(
        f"ramp on a virtual clock, {len(verdicts)} seeds: worst window {worst:.2f} of off, at most {turns} turns",
        loc="left",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run_live_ramp(config: RampBenchConfig, console: Console) -> dict[str, Any]:
    """Puts the engine itself under the ramp, in real time, with a table; writes ``live.json`` and returns it."""
    with console.status("loading and warming up"):
        llm = _load(config)
        measured_costs(llm)
    prompts = load_prompts(None, llm.tokenizer, max_prompts=200, max_prompt_tokens=config.requests.num_prompt_tokens)
    engine = _LiveEngine(llm, prompts, config.requests, seed=config.seeds[0])
    table = _LiveTable(config.profile)
    with Live(console=console, auto_refresh=False) as live:

        def show(step: StepSeen) -> None:
            if table.count(step, llm):
                live.update(table.render(), refresh=True)

        run = run_ramp(engine, config.profile, on_step=show)
    engine.close()
    results = {
        "machine": describe_machine(),
        "kind": "live",
        "window_s": _WINDOW_S,
        "profile": asdict(config.profile),
        "requests": asdict(config.requests),
        "tokens_per_s": [round(rate, 2) for rate in run.windows(_WINDOW_S)],
        "nodes": [round(mean, 3) for mean in run.nodes(_WINDOW_S)],
        "reasons": table.reasons,
    }
    write_json(results, config.output_dir / "live.json")
    return results


def _load(config: RampBenchConfig) -> LLM:
    return LLM(
        config.model,
        config.draft_head,
        dtype="float32",
        enable_prefix_cache=False,
        max_num_requests=max(config.profile.levels),
    )


class _LiveEngine:
    """`RampedEngine` over a real one; its clock is the wall's."""

    def __init__(self, llm: LLM, prompts: Sequence[BenchPrompt], asked: RampRequests, *, seed: int):
        self._llm, self._prompts, self._asked = llm, prompts, asked
        self._rng = random.Random(seed)
        self._ids = itertools.count()
        self._began_s = time.perf_counter()
        self._num_rows = self._num_decoding = 0
        llm.engine.on_step = self._note

    @property
    def num_active(self) -> int:
        """See `RampedEngine`."""
        return len(self._llm.engine.requests)

    def add(self) -> None:
        """See `RampedEngine`."""
        index = next(self._ids)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=self._rng.randint(self._asked.min_output, self._asked.max_output),
            ignore_eos=True,
            speculation=SpeculationOptions(mode=SpeculationMode.AUTO),
        )
        prompt = self._prompts[index % len(self._prompts)].token_ids
        self._llm.engine.add(self._llm.frontend.make_request(f"ramp-{index}", prompt, params))

    def step(self) -> StepSeen:
        """See `RampedEngine`."""
        self._num_rows = self._num_decoding = 0
        num_tokens = sum(len(delta.token_ids) for delta in self._llm.engine.step())
        return StepSeen(
            ended_s=time.perf_counter() - self._began_s,
            num_tokens=num_tokens,
            num_decoding=self._num_decoding,
            num_rows=self._num_rows,
        )

    def close(self) -> None:
        """Ends what still runs."""
        self._llm.engine.on_step = None
        for request_id in list(self._llm.engine.requests):
            self._llm.engine.abort(request_id)

    def _note(self, record: StepRecord) -> None:
        self._num_decoding = len(record.requests)
        self._num_rows = sum(entry.tree.num_nodes for entry in record.requests)


class _LiveTable:
    """The last windows of a live ramp."""

    def __init__(self, profile: RampProfile):
        self._profile = profile
        self._run = RampRun(profile=profile)
        self._rows: deque[tuple[str, ...]] = deque(maxlen=_SHOWN_WINDOWS)
        self._next_s = _WINDOW_S
        #: Why the policy did what it did, by window.
        self.reasons: list[str] = []

    def count(self, step: StepSeen, llm: LLM) -> bool:
        """Counts a step; True when a window ended."""
        self._run.steps.append(step)
        if step.ended_s < self._next_s:
            return False
        recent = [s for s in self._run.steps if s.ended_s > self._next_s - _WINDOW_S]
        num_tokens = sum(s.num_tokens for s in recent)
        rows, roots = sum(s.num_rows for s in recent), sum(s.num_decoding for s in recent)
        reason = llm.engine.scheduler.budget.reason
        self.reasons.append(reason)
        self._rows.append(
            (
                f"{self._next_s:.0f}",
                str(self._profile.at(self._next_s - _WINDOW_S / 2)),
                f"{num_tokens / _WINDOW_S:.0f}",
                f"{rows / max(1, roots):.1f}",
                reason,
            )
        )
        self._next_s += _WINDOW_S
        return True

    def render(self) -> Table:
        """For a terminal."""
        table = Table(box=None, header_style="bold")
        for title in ("s", "requests", "tok/s", "nodes per tree", "why"):
            table.add_column(title, justify="right")
        for row in self._rows:
            table.add_row(*row)
        return table
