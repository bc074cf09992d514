"""What a measurement under load leaves: ``results.json``, a table, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jetflow_cluster.bench.load.rows import is_fixed
from jetflow_cluster.bench.report import load_pyplot

COLOURS = {"off": "#7f8c9a", "auto": "#0b7a75", "transformers": "#c9a227", "openai": "#8a4fbf"}
_FIXED_COLOURS = ("#bfe3df", "#f0b28c", "#e07b53", "#a63d1f")


def load_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("system")
    for title in ("load", "tok/s", "each", "first, ms", "to off", "90 %", "to best", "90 %", "tok/step", "plan"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        length, share = row["mean_acceptance_length"], row.get("planning_share")
        table.add_row(
            row["system"],
            f"{row['level']:g}" + ("" if row["loop"] == "closed" else "/s"),
            f"{row['tokens_per_s']:.0f}",
            f"{row['request_tokens_per_s']:.0f}",
            f"{1e3 * row['first_s']:.1f}",
            *_ratio(row, "off"),
            *_ratio(row, "best_fixed"),
            "-" if length is None else f"{length:.2f}",
            "-" if share is None else f"{100 * share:.1f} %",
            style="bold" if row["system"] == "auto" else None,
        )
    return table


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a page: one line per level, one column per system, and how `auto` compares."""
    names = list(dict.fromkeys(row["system"] for row in rows))
    lines = [
        f"| load | {' | '.join(f'{name}, tok/s' for name in names)} | auto to off | to the best fixed |",
        "|" + "---|" * (len(names) + 3),
    ]
    for loop, level in dict.fromkeys((row["loop"], row["level"]) for row in rows):
        here = {row["system"]: row for row in rows if (row["loop"], row["level"]) == (loop, level)}
        speeds = [f"{here[name]['tokens_per_s']:.0f}" if name in here else "" for name in names]
        auto = here.get("auto")
        ratios = ["", ""] if auto is None else [", ".join(_ratio(auto, key)) for key in ("off", "best_fixed")]
        lines.append(f"| {level:g}{'' if loop == 'closed' else '/s'} | {' | '.join(speeds)} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def draw_load(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Throughput against the speed that one request sees, a line per system; and the ratio to `off` by load."""
    plt = load_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    names = list(dict.fromkeys(row["system"] for row in rows))
    colours = _colours(names)
    for name in names:
        points = [row for row in rows if row["system"] == name]
        style = {"color": colours[name], "marker": "o", "label": name, "linewidth": 2.4 if name == "auto" else 1.3}
        if name != "transformers":
            xs = [row["request_tokens_per_s"] for row in points]
            left.plot(xs, [row["tokens_per_s"] for row in points], **style)
        ratios = [row for row in points if row["ratio_to_off"] is not None]
        levels = [row["level"] for row in ratios]
        right.plot(levels, [row["ratio_to_off"] for row in ratios], **style)
        if name == "auto" and ratios:
            low, high = zip(*(row["ratio_to_off_bounds"] for row in ratios), strict=True)
            right.fill_between(levels, low, high, color=colours[name], alpha=0.15)
    for row in rows:
        if row["system"] == "auto":
            at = (row["request_tokens_per_s"], row["tokens_per_s"])
            left.annotate(f"{row['level']:g}", at, textcoords="offset points", xytext=(4, 5), fontsize=7)
    left.set_xlabel("tokens per second that one request sees (median)")
    left.set_ylabel("tokens per second, all requests")
    levels = sorted({row["level"] for row in rows})
    is_closed = all(row["loop"] == "closed" for row in rows)
    right.set_xscale("log", base=2)
    right.set_xticks(levels, [f"{level:g}" for level in levels])
    right.set_xlabel("requests at a time" if is_closed else "requests per second")
    right.set_ylabel("paired ratio to off (median; auto with its 90 % bounds)")
    right.axhline(1.0, color="#999999", linewidth=0.8)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9, color="#555555")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _colours(names: Sequence[str]) -> dict[str, str]:
    fixed = iter(_FIXED_COLOURS * len(names))
    return {name: next(fixed) if is_fixed(name) else COLOURS.get(name, "#444444") for name in names}


def _ratio(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    ratio, bounds = row[f"ratio_to_{key}"], row[f"ratio_to_{key}_bounds"]
    if ratio is None:
        return "-", ""
    return f"{ratio:.2f}", f"{bounds[0]:.2f}-{bounds[1]:.2f}"
