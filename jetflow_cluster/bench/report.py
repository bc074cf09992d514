"""The files that a measurement leaves: ``results.json``, and a picture beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

_COLOURS = {
    "off": "#7f8c9a",
    "auto": "#0b7a75",
    "transformers": "#c9a227",
    "transformers prompt lookup": "#c2571a",
}
_FORCED_COLOUR = "#7cc6c0"


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """Writes plain JSON values; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("system")
    for title in ("dtype", "batch", "tok/s", "vs off", "vs transf.", "vs lookup", "tok/step", "same output"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["system"],
            row["dtype"],
            str(row["batch_size"]),
            f"{row['tokens_per_s']:.0f}",
            *(_ratio(row[key]) for key in ("ratio_to_off", "ratio_to_transformers", "ratio_to_prompt_lookup")),
            f"{row['mean_acceptance_length']:.2f}",
            f"{row['share_same_outputs']:.0%}",
            style="bold" if row["system"] == "auto" else None,
        )
    return table


def draw_offline(results: Mapping[str, Any], path: Path) -> None:
    """Draws speed at batch size 1 for each system, and speed against the batch size."""
    plt = load_pyplot()
    rows = results["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    has_batches = len({row["batch_size"] for row in rows}) > 1
    num_columns = 1 + has_batches
    figure, axes = plt.subplots(
        len(dtypes), num_columns, figsize=(6.4 * num_columns, 3.6 * len(dtypes) + 0.6), squeeze=False
    )
    for dtype, panels in zip(dtypes, axes, strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        smallest = min(row["batch_size"] for row in of_dtype)
        _draw_systems(panels[0], [row for row in of_dtype if row["batch_size"] == smallest], dtype, smallest)
        if has_batches:
            _draw_batches(panels[1], of_dtype, dtype)
    figure.suptitle(_subtitle(results), fontsize=9, color="#555555")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def load_pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    return plt


def _draw_systems(axes: Any, rows: Sequence[Mapping[str, Any]], dtype: str, batch_size: int) -> None:
    ordered = sorted(rows, key=lambda row: row["tokens_per_s"])
    colours = [_COLOURS.get(row["system"], _FORCED_COLOUR) for row in ordered]
    bars = axes.barh([row["system"] for row in ordered], [row["tokens_per_s"] for row in ordered], color=colours)
    labels = [f" {row['tokens_per_s']:.0f}   {_ratio(row['ratio_to_off'])}" for row in ordered]
    axes.bar_label(bars, labels=labels, fontsize=8)
    axes.margins(x=0.22)
    axes.set_xlabel("tokens per second (median), and median ratio to the engine without speculation")
    axes.xaxis.label.set_fontsize(8)
    axes.set_title(f"{dtype}, batch {batch_size}", loc="left", fontweight="bold")


def _draw_batches(axes: Any, rows: Sequence[Mapping[str, Any]], dtype: str) -> None:
    sizes = sorted({row["batch_size"] for row in rows})
    for system in ("auto", "off", "transformers"):
        points = sorted((row["batch_size"], row["tokens_per_s"]) for row in rows if row["system"] == system)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=system, color=_COLOURS[system])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("requests at a time")
    axes.set_ylabel("tokens per second, all requests")
    axes.grid(axis="y", which="both", alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title(f"{dtype}, by batch size", loc="left", fontweight="bold")


def _subtitle(results: Mapping[str, Any]) -> str:
    machine, model, settings = results["machine"], results["model"], results["settings"]
    device = machine["gpus"][0]["name"] if machine["gpus"] else f"{machine['cpu']}, {machine['num_cores']} cores"
    size = model["num_target_parameters"] / 1e6
    return f"{model['target']} ({size:.1f} M parameters), {settings['max_tokens']} tokens per prompt, greedy; {device}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
