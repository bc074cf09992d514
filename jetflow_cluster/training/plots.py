"""Pictures of training and evaluation."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def _axes(num: int, width: float = 6.0) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, num, figsize=(width * num, 4.2), layout="constrained", squeeze=False)
    return figure, axes[0]


def plot_distillation(log: Path, picture: Path) -> None:
    """KL and held-out acceptance over the minutes of a run, from its ``distill.csv``."""
    with log.open(newline="") as handle:
        rows = [[float(x) for x in row] for row in csv.reader(handle)]
    figure, (left, right) = _axes(2)
    left.plot([r[2] / 60 for r in rows], [r[4] for r in rows])
    left.set(xlabel="minutes", ylabel="KL, nats per token, all depths", title="training")
    measured = [r for r in rows if r[7] == r[7]]
    for column, nodes in ((7, 16), (8, 32)):
        right.plot([r[2] / 60 for r in measured], [r[column] for r in measured], marker="o", label=f"{nodes} nodes")
    right.set(xlabel="minutes", ylabel="tokens per step", title="held-out prompts, exact tree")
    right.legend()
    figure.savefig(picture, dpi=130)


def plot_acceptance(panels: Mapping[str, Sequence[Mapping[str, Any]]], picture: Path) -> None:
    """Tokens per step over nodes, one panel per temperature.

    Args:
        panels: title to rows with ``name``, ``budgets``, ``acceptance`` and ``standard_error``.
        picture: PNG to write.
    """
    figure, axes = _axes(len(panels))
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        for row in rows:
            style = "--" if len(row["budgets"]) == 1 else "-"
            axis.errorbar(
                row["budgets"],
                row["acceptance"],
                yerr=row["standard_error"],
                label=row["name"],
                marker="o",
                markersize=3,
                linestyle=style,
                capsize=2,
            )
        axis.set_xscale("log", base=2)
        axis.set(xlabel="nodes, root included", ylabel="tokens per step, bonus included", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(picture, dpi=130)


def plot_ablation(rows: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Bars of acceptance at 16 and 32 nodes per variant."""
    figure, (axis,) = _axes(1, width=9)
    names = [str(r["name"]) for r in rows]
    for i, nodes in enumerate((16, 32)):
        places = [k + 0.38 * i for k in range(len(rows))]
        values = [r["acceptance"][str(nodes)] for r in rows]
        errors = [r["standard_error"][str(nodes)] for r in rows]
        axis.barh(places, values, height=0.36, xerr=errors, label=f"{nodes} nodes")
    axis.set_yticks([k + 0.19 for k in range(len(rows))], names)
    axis.invert_yaxis()
    axis.set_xlim(left=1.0)
    axis.set(xlabel="tokens per step on validation prompts, exact tree, equal training time")
    axis.legend()
    figure.savefig(picture, dpi=130)
