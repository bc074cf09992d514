"""The tables and the picture of `jetflow bench step`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jetflow_cluster.bench.report import load_pyplot

_COLOURS = {"draft": "#7cc6c0", "build": "#c9a227", "verify": "#0b7a75", "accept": "#c2571a", "commit": "#7f8c9a"}


def step_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All rows for a terminal; the whole step stands out."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("batch", "nodes", "prefix"):
        table.add_column(title, justify="right")
    table.add_column("stage", no_wrap=True)
    for title in ("time us", "MB", "floor us", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("batch_size", "num_nodes", "prefix_len", "stage")),
            "-" if row["time_us"] is None else f"{row['time_us']:.1f}",
            f"{row['num_bytes'] / 1e6:.2f}",
            f"{row['floor_us']:.1f}",
            "-" if row["ratio_to_floor"] is None else f"{row['ratio_to_floor']:.2f}",
            style="bold" if row["stage"] == "step" else None,
        )
    return table


def draw_steps(results: Mapping[str, Any], path: Path) -> None:
    """Draws each step's stages as one bar, and its floor as a mark; without times, the floors alone."""
    plt = load_pyplot()
    rows = results["rows"]
    points = list(dict.fromkeys((row["batch_size"], row["num_nodes"], row["prefix_len"]) for row in rows))
    figure, axes = plt.subplots(figsize=(8.5, 1.6 + 0.34 * max(1, len(points))))
    for place, point in enumerate(points):
        of_point = {
            row["stage"]: row for row in rows if (row["batch_size"], row["num_nodes"], row["prefix_len"]) == point
        }
        left = 0.0
        for stage, colour in _COLOURS.items():
            found = of_point.get(stage)
            if found is None or found["time_us"] is None:
                continue
            axes.barh(place, found["time_us"], left=left, color=colour, label=stage if place == 0 else None)
            left += found["time_us"]
        axes.plot([of_point["step"]["floor_us"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.plot([], [], color="black", linewidth=2, label="floor")
    axes.set_yticks(range(len(points)), [f"batch {b}, {n} nodes, prefix {p}" for b, n, p in points])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds per step, each stage waited for")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=8)
    machine, model, settings = results["machine"], results["model"], results["settings"]
    device = machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]
    rate = settings["bandwidth_bytes_per_s"] / 1e9
    axes.set_title(
        f"{model['shape']}, {model['dtype']}, random weights; {device}, {rate:.0f} GB/s copied", fontsize=9, loc="left"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
