"""`jetflow bench simulate`: a page of predicted curves for Qwen3-8B on 1, 2 and 4 H200, with its assumptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jetflow_cluster.bench.load.published import (
    PUBLISHED_LENGTHS,
    TASKS,
    Gpu,
    ServedModel,
    gpu_costs,
    lengths_of,
    most_requests,
)
from jetflow_cluster.bench.load.simulate import MIN_GAIN, Placement, Point, crossing, predict
from jetflow_cluster.bench.report import load_pyplot, write_json

LOADS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
#: Tokens behind each request, and seconds of the way to a dedicated worker and back [assumed].
CONTEXT, LINK_S = 1024, 50e-6
_FIXED = (16, 64, 256)
_PAGE = "simulated-qwen3-8b.md"


def placements(gpu: Gpu, model: ServedModel, context: int) -> dict[int, list[Placement]]:
    """By number of GPUs."""

    def colocated(num: int) -> Placement:
        most = most_requests(gpu, model, num, context, has_head=True)
        return Placement(name=f"colocated, TP {num}", cost=gpu_costs(gpu, model, num), max_requests=most)

    def dedicated(num_ranks: int, num_workers: int) -> Placement:
        return Placement(
            name=f"dedicated, TP {num_ranks} and {num_workers} draft worker{'s' if num_workers > 1 else ''}",
            cost=gpu_costs(gpu, model, num_ranks, draft_tp_size=1),
            num_draft_workers=num_workers,
            link_s=LINK_S,
            max_requests=most_requests(gpu, model, num_ranks, context, has_head=False),
        )

    return {1: [colocated(1)], 2: [colocated(2), dedicated(1, 1)], 4: [colocated(4), dedicated(2, 2)]}


def write_simulation(output: Path) -> dict[str, Any]:
    """Writes the page, its pictures and ``results.json`` under a folder, and returns the last one's content."""
    gpu, model = Gpu(), ServedModel()
    folder = output / "results" / "simulated"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, dict[int, list[Point]]]] = {}
    for task, columns in TASKS.items():
        lengths = lengths_of(columns)
        found[task] = {}
        for num_gpus, places in placements(gpu, model, CONTEXT).items():
            for place in places:
                points = predict(place, lengths, LOADS, context=CONTEXT, block_size=model.block_size)
                found[task].setdefault(place.name, {})[num_gpus] = points
    rows = [
        _row(task, name, num_gpus, points)
        for task, by_name in found.items()
        for name, by_gpus in by_name.items()
        for num_gpus, points in by_gpus.items()
    ]
    results = {
        "source": "simulated from published figures; not measured",
        "gpu": asdict(gpu),
        "model": asdict(model),
        "context": CONTEXT,
        "lengths": {task: lengths_of(columns) for task, columns in TASKS.items()},
        "rows": rows,
    }
    write_json(results, folder / "results.json")
    main = next(iter(TASKS))
    _draw(found[main], main, folder / "curves.png")
    _draw_gains(found, folder / "gains.png")
    (output / _PAGE).write_text(_page(gpu, model, rows, found[main]), encoding="utf-8")
    return results


def _row(task: str, name: str, num_gpus: int, points: Sequence[Point]) -> dict[str, Any]:
    return {
        "name": f"{task}, {num_gpus} GPU, {name}",
        "task": task,
        "placement": name,
        "num_gpus": num_gpus,
        "crossing": crossing(points),
        "crossing_of_fixed": {n: crossing(points, n) for n in _FIXED},
        "points": [
            {
                "num_requests": p.num_requests,
                "num_nodes": p.num_nodes,
                "step_ms": round(1e3 * p.step_s, 3),
                "tokens_per_s": round(p.tokens_per_s, 1),
                "off_tokens_per_s": round(p.off_tokens_per_s, 1),
                "ratio_to_off": round(p.gain, 3),
                "has_cohorts": p.has_cohorts,
            }
            for p in points
        ],
    }


def _draw(found: Mapping[str, Mapping[int, Sequence[Point]]], task: str, path: Path) -> None:
    plt = load_pyplot()
    counts = sorted({num for by_gpus in found.values() for num in by_gpus})
    figure, panels = plt.subplots(1, len(counts), figsize=(5.2 * len(counts), 4.2), sharey=True)
    for num_gpus, axes in zip(counts, panels, strict=True):
        for name, by_gpus in found.items():
            if num_gpus not in by_gpus:
                continue
            points = by_gpus[num_gpus]
            is_main = name.startswith("colocated")
            speeds = [p.tokens_per_s / p.num_requests for p in points]
            colour = "#0b7a75" if is_main else "#c2571a"
            axes.plot(speeds, [p.tokens_per_s for p in points], "o-", ms=3, color=colour, label=f"auto, {name}")
            if is_main:
                for p in points:
                    label = f"{p.num_requests}: {p.num_nodes}"
                    at = (p.tokens_per_s / p.num_requests, p.tokens_per_s)
                    axes.annotate(label, at, textcoords="offset points", xytext=(4, 4), fontsize=6)
                off = [p.off_tokens_per_s for p in points]
                per = [p.off_tokens_per_s / p.num_requests for p in points]
                axes.plot(per, off, "o-", ms=3, color="#7f8c9a", label="off")
                for n, shade in zip(_FIXED, ("#f0b28c", "#e07b53", "#a63d1f"), strict=True):
                    rates = [p.by_nodes[n] for p in points]
                    per = [p.by_nodes[n] / p.num_requests for p in points]
                    axes.plot(per, rates, "--", color=shade, lw=1, label=f"always {n} nodes")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("tokens per second of one request")
        axes.set_title(f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}", loc="left", fontweight="bold")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("tokens per second, all requests")
    figure.suptitle(f"Simulated, not measured: Qwen3-8B on H200, {task}. Labels: requests, nodes per tree", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_gains(found: Mapping[str, Mapping[str, Mapping[int, Sequence[Point]]]], path: Path) -> None:
    plt = load_pyplot()
    figure, panels = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.8), sharey=True)
    for (task, by_name), axes in zip(found.items(), panels, strict=True):
        for name, by_gpus in by_name.items():
            for num_gpus, points in by_gpus.items():
                style = "-" if name.startswith("colocated") else "--"
                label = f"{num_gpus} GPU, {name}"
                axes.plot([p.num_requests for p in points], [p.gain for p in points], style, label=label)
        axes.axhline(1.0, color="#999999", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("requests at a time")
        axes.set_title(task, loc="left", fontweight="bold")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("auto over off, same placement")
    panels[0].legend(frameon=False, fontsize=7)
    figure.suptitle("Simulated, not measured", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _page(
    gpu: Gpu, model: ServedModel, rows: Sequence[Mapping[str, Any]], main: Mapping[str, Mapping[int, Sequence[Point]]]
) -> str:
    first = next(iter(main.values()))[1]
    parts = [
        "# Qwen3-8B on H200, simulated",
        (
            "`jetflow bench simulate --output docs` writes this page. **Nothing here was measured**: the curves follow"
            " from published figures and the assumptions below, by the cost model that the engine uses"
            " (`engine/cost_model.py`). Where a GPU is at hand, `jetflow doctor --costs` measures what"
            " stands here as assumed."
        ),
        "![curves](results/simulated/curves.png)",
        "## Where speculation stops to pay",
        (
            f"The first number of requests at which the gain is below {MIN_GAIN:.2f}, of those that were looked at"
            f" ({', '.join(map(str, LOADS))}). Fixed trees cross far earlier than the best ones, which shrink first."
            " Dedicated placements are compared with the same target ranks without a head."
        ),
        _crossings(rows),
        "![gains](results/simulated/gains.png)",
        "## Curves",
        _curves(main),
        "Against each other at the same number of GPUs: at few requests a colocated head is the faster one, for its GPU"
        " also verifies."
        if _colocated_wins(main)
        else "",
        "## Assumptions",
        _assumptions(gpu, model),
        "## How far to trust it",
        _check(first),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _crossings(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = ["task", "GPUs", "placement", "best size", *(f"always {n}" for n in _FIXED)]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        found = [row["crossing"], *(row["crossing_of_fixed"][n] for n in _FIXED)]
        last = row["points"][-1]["num_requests"]
        words = [f"none up to {last}" if value is None else str(value) for value in found]
        lines.append(f"| {row['task']} | {row['num_gpus']} | {row['placement']} | {' | '.join(words)} |")
    return "\n".join(lines)


def _curves(main: Mapping[str, Mapping[int, Sequence[Point]]]) -> str:
    lines = []
    for name, by_gpus in main.items():
        for num_gpus, points in by_gpus.items():
            lines += [
                f"**{num_gpus} GPU{'s' if num_gpus > 1 else ''}, {name}** ({next(iter(TASKS))})",
                "",
                "| requests | nodes per tree | step, ms | tokens/s | off, tokens/s | gain | two cohorts |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [
                f"| {p.num_requests} | {p.num_nodes} | {1e3 * p.step_s:.2f} | {p.tokens_per_s:.0f} |"
                f" {p.off_tokens_per_s:.0f} | {p.gain:.2f} | {'yes' if p.has_cohorts else ''} |"
                for p in points
            ]
            lines.append("")
    return "\n".join(lines).rstrip()


def _colocated_wins(main: Mapping[str, Mapping[int, Sequence[Point]]]) -> bool:
    for num_gpus in (2, 4):
        rates = {name: by[num_gpus][0].tokens_per_s for name, by in main.items() if num_gpus in by}
        if not max(rates, key=lambda name: rates[name]).startswith("colocated"):
            return False
    return True


def _assumptions(gpu: Gpu, model: ServedModel) -> str:
    lengths = {task: lengths_of(columns) for task, columns in TASKS.items()}
    table = ["| tokens per step | " + " | ".join(map(str, next(iter(lengths.values())))) + " |"]
    table.append("|" + "---|" * (1 + len(next(iter(lengths.values())))))
    table += [f"| {task} | " + " | ".join(f"{v:.2f}" for v in by.values()) + " |" for task, by in lengths.items()]
    items = [
        (
            f"Memory: {gpu.memory_bytes_per_s / 1e12:g} TB/s at the peak (NVIDIA's data sheet), of which"
            f" {gpu.memory_share:g} is reached: an 8 B model at 127.8 tokens per second on an H100 of 3.35 TB/s reads"
            " at that share of its peak (arXiv 2606.18394, table 11)."
        ),
        (
            f"Compute: {gpu.flops / 1e12:.0f} bf16 TFLOP/s at the peak (data sheet), of which {gpu.flops_share:g} is"
            " reached (assumed). A pass takes the longer of reading and computing."
        ),
        (
            f"Weights that a pass reads: {model.num_parameters / 1e9:g} B parameters of"
            f" {model.bytes_per_parameter} bytes,"
            f" {model.num_parameters * model.bytes_per_parameter / 1e9:.1f} GB. Keys and values:"
            f" {model.kv_bytes} bytes per"
            f" token; {CONTEXT} tokens behind each request (assumed), read once per step and request."
        ),
        (
            f"The head: {model.draft_share:g} of a pass at batch 1 (table 12 of the paper, on an H200 NVL, by latency),"
            f" and {model.num_draft_parameters / 1e9:g} B parameters computed over {model.block_size} rows"
            " per request; its"
            " context is cached. Sharded with the target where it is colocated, whole on each dedicated worker."
        ),
        (
            f"Tensor parallel: two all-reduces per layer, each {1e6 * gpu.all_reduce_s:.0f} microseconds"
            " (assumed) and its"
            f" bytes at {gpu.link_bytes_per_s / 1e9:.0f} GB/s (data sheet). Dedicated workers: {1e6 * LINK_S:.0f}"
            " microseconds to them and back (assumed); two cohorts in flight where that is faster."
        ),
        (
            "Nothing else takes time: no scheduling, tree building, sampling, prompts, or network."
            " Attention to the tree's"
            " own nodes is free. Each shortens the gain a little, prompts also the load at which it ends."
        ),
        (
            "Tokens per step: arXiv 2606.18394, tables 1 and 2, greedy, one H100. Where a larger tree is published with"
            f" less than a smaller one, the smaller one's figure stays. Below {min(PUBLISHED_LENGTHS)}"
            " nodes nothing was"
            " published; a chain of equally probable guesses is assumed there. Acceptance is taken to be"
            " the same at every"
            " load and for every request; a policy that chooses per request does better than one size for all."
        ),
    ]
    return "\n".join([*(f"* {item}" for item in items), "", *table])


def _check(alone: Sequence[Point]) -> str:
    del alone
    h100 = Gpu(name="H100", memory_bytes_per_s=3.35e12)
    model = ServedModel()
    place = Placement(name="H100", cost=gpu_costs(h100, model, 1))
    published = {64: 6.76, 128: 8.93, 256: 9.64}
    lines = [
        (
            "The same model of an H100 at one request, beside the speedups that the paper measured there"
            " on MATH500 (its"
            " table 2, against its own harness without speculation):"
        ),
        "",
        "| nodes | simulated speedup | published |",
        "|---|---|---|",
    ]
    lengths = {1: 1.0} | {n: PUBLISHED_LENGTHS[n][1] for n in published}
    point = predict(place, lengths, (1,), context=CONTEXT)[0]
    lines += [f"| {n} | {point.by_nodes[n] / point.off_tokens_per_s:.2f} | {published[n]:.2f} |" for n in published]
    lines += [
        "",
        (
            "Its table of larger batches (11) was not used: there, speed without speculation hardly grows"
            " with the batch,"
            " which an engine that batches well does not show."
        ),
    ]
    return "\n".join(lines)
