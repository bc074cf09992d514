"""`jetflow doctor`: what is installed, what is missing, and what would run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jetflow_cluster import __version__
from jetflow_cluster.bench.machine import describe_machine
from jetflow_cluster.bench.prompts import DEFAULT_CHECKPOINT, HELD_OUT_PROMPTS
from jetflow_cluster.config import DTYPES, EngineConfig


def examine(config: EngineConfig | None = None) -> dict[str, Any]:
    """Everything that is shown, as plain JSON values. Imports torch, loads no model.

    Args:
        config: of the engine whose memory is planned; None is the default.
    """
    import torch

    from jetflow_kernels.cpu import cpu_kernels

    machine = describe_machine()
    has_gpu = torch.cuda.is_available()
    plan = _memory_plan(config or EngineConfig())
    checkpoints = {name: _folder_bytes(DEFAULT_CHECKPOINT / name) for name in ("target", "draft_head")}
    return {
        "version": __version__,
        "machine": machine,
        "embedded_default": {
            "num_bytes": checkpoints,
            "has_sidecar": (DEFAULT_CHECKPOINT / "draft_head" / "sidecar.safetensors").is_file(),
            "has_held_out_prompts": HELD_OUT_PROMPTS.is_file(),
        },
        "would_run": {
            "device": "cuda" if has_gpu else "cpu",
            "attention": "PyTorch on the GPU" if has_gpu else "PyTorch on the CPU",
            "cpu_kernels": cpu_kernels().detail,
            "dtypes": _dtypes(),
            "threads": torch.get_num_threads(),
        },
        "memory_plan": plan,
        "warnings": _warnings(machine, checkpoints) + ([plan["refused"]] if "refused" in plan else []),
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """Shows what `examine` found."""
    machine, run, embedded = report["machine"], report["would_run"], report["embedded_default"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("jetflow", report["version"])
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in machine["packages"].items()))
    table.add_row("processor", f"{machine['cpu']}, {machine['num_cores']} cores")
    table.add_row("instructions", ", ".join(f"{by} {name or 'none'}" for by, name in machine["instructions"].items()))
    table.add_row("memory", _size(machine["memory_bytes"]))
    for gpu in machine["gpus"]:
        table.add_row("GPU", f"{gpu['name']}, {_size(gpu['memory_bytes'])}")
    for name, size in embedded["num_bytes"].items():
        table.add_row(f"embedded {name.replace('_', ' ')}", _size(size) if size else "[red]missing[/red]")
    table.add_row("side-car", "yes" if embedded["has_sidecar"] else "no")
    table.add_row("would run on", f"{run['device']}, {run['threads']} threads, attention by {run['attention']}")
    table.add_row("CPU kernels", run["cpu_kernels"])
    table.add_row("dtypes", "; ".join(f"{name}: {how}" for name, how in run["dtypes"].items()))
    console.print(table)
    if "lines" in report["memory_plan"]:
        console.print(_memory_table(report["memory_plan"]))
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}")
    if not report["warnings"]:
        console.print("[green]nothing to complain about[/green]")


def _memory_plan(config: EngineConfig) -> dict[str, Any]:
    """What an engine would hold, or why it would not start."""
    from jetflow_cluster.engine.planned_memory import plan_memory

    try:
        plan = plan_memory(config)
    except (ValueError, FileNotFoundError) as error:
        return {"refused": str(error)}
    return {
        "lines": [{"name": line.name, "num_bytes": line.num_bytes, "detail": line.detail} for line in plan.lines()],
        "total_bytes": plan.total_bytes,
        "available_bytes": plan.available_bytes,
        "num_pages": plan.num_pages,
    }


def _memory_table(plan: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("memory of an engine")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("of which")
    for line in plan["lines"]:
        table.add_row(line["name"], _size(line["num_bytes"]), line["detail"])
    table.add_row("together", _size(plan["total_bytes"]), f"of {_size(plan['available_bytes'])} free", style="bold")
    return table


def _warnings(machine: dict[str, Any], checkpoints: dict[str, int]) -> list[str]:
    found = []
    for name, size in checkpoints.items():
        if not size:
            found.append(
                f"the embedded {name.replace('_', ' ')} is missing: reinstall, run make train, or give --model"
            )
    if machine["load_average"] > machine["num_cores"]:
        found.append(f"the machine is busy (load {machine['load_average']}): measurements will be noisy")
    if machine["num_threads"] > machine["num_cores"]:
        found.append(
            f"torch uses {machine['num_threads']} threads on {machine['num_cores']} cores: set JETFLOW_NUM_THREADS"
        )
    return found


def _dtypes() -> dict[str, str]:
    """In what each dtype is computed where the engine would run."""
    from jetflow_cluster.engine.resolve import compute_device, compute_dtype

    device = compute_device(EngineConfig())
    found = {}
    for name in DTYPES:
        computed = compute_dtype(EngineConfig(dtype=name), device)
        how = "the checkpoint's" if computed is None else str(computed).removeprefix("torch.")
        found[name] = "computed as such" if how == name else how if name == "auto" else f"computed in {how}"
    return found


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
