"""Rebuilds the embedded default from nothing: corpus, target, draft head, side-car, figures. What ``make train`` runs.

Every stage is skipped when its result is there, and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from jetflow_cluster.training import corpus
from jetflow_cluster.training.calibration import calibration_rollouts, fit_lookup_weights, fit_sharpness
from jetflow_cluster.training.distill import DistillConfig, distill
from jetflow_cluster.training.evaluate import EvaluateConfig, evaluate
from jetflow_cluster.training.model_card import write_model_card
from jetflow_cluster.training.pretrain import PretrainConfig, pretrain
from jetflow_cluster.training.quality import measure_quality
from jetflow_cluster.training.regenerate import load_tokenizer
from jetflow_cluster.training.sidecar_training import SideCarTrainingConfig, train_sidecar
from jetflow_kernels.machine import machine

DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "default"
NUM_HELD_OUT_PROMPTS = 200
PROMPT_TOKENS = 128


def head_config(folder: Path, minutes: float) -> DistillConfig:
    """The head that ships; its settings won the ablation of `BENCHMARKS.md`."""
    return DistillConfig(
        target=folder / "target",
        source=folder / "corpus",
        output_dir=folder / "head",
        data_dir=folder / "data",
        max_minutes=minutes,
    )


def run(folder: Path, *, target_minutes: float, head_minutes: float, comparison_minutes: float) -> None:
    """All stages.

    Args:
        folder: everything on the way.
        target_minutes: pre-training of the target.
        head_minutes: training of the head that ships.
        comparison_minutes: training of each of the two heads, causal and bidirectional, that are compared; 0 leaves
            that comparison out.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus.build(folder / "corpus")
    if not (folder / "report.json").exists():
        target = PretrainConfig(corpus_dir=folder / "corpus", output_dir=folder, max_minutes=target_minutes)
        pretrain(target, device=device)
    write_held_out_prompts(folder / "held_out_prompts.json", folder / "corpus", folder / "target")
    config = head_config(folder, head_minutes)
    head = _timed(folder, "head", lambda: distill(config, device=device))
    if not (head / "sidecar_config.json").exists():
        _timed(
            folder, "sidecar", lambda: train_sidecar(SideCarTrainingConfig(distill=config, head=head), device=device)
        )
    if not (folder / "quality.json").exists():
        found = measure_quality(folder / "target", folder / "corpus")
        (folder / "quality.json").write_text(json.dumps(found, indent=1))
    if not (folder / "lookup_weights.json").exists():
        rollouts = calibration_rollouts(config)
        fit_sharpness(head, rollouts)
        (folder / "lookup_weights.json").write_text(json.dumps(fit_lookup_weights(head, rollouts)))
    if not (folder / "evaluation" / "acceptance.json").exists():
        evaluate(evaluation_config(folder, head))
    if comparison_minutes and not (folder / "comparison" / "acceptance.json").exists():
        compare_causality(config, comparison_minutes, device)
    export(folder, head, DEFAULT_CHECKPOINT)


def evaluation_config(folder: Path, head: Path) -> EvaluateConfig:
    """The comparison of drafters on the test prompts."""
    return EvaluateConfig(
        target=folder / "target",
        head=head,
        prompts=folder / "held_out_prompts.json",
        output_dir=folder / "evaluation",
    )


def compare_causality(config: DistillConfig, minutes: float, device: str) -> dict[str, Any]:
    """Trains a causal head for some minutes, a bidirectional one on as many blocks, and evaluates them side by side."""
    folder = config.output_dir.parent / "comparison"
    config = replace(config, measure_every_minutes=100)
    heads = {
        "causal": distill(replace(config, output_dir=folder / "causal", max_minutes=minutes), device=device),
    }
    num_blocks = int((folder / "causal" / "distill.csv").read_text().splitlines()[-1].split(",")[1])
    alike = replace(config, causal=False, max_minutes=math.inf, max_blocks=num_blocks)
    heads["bidirectional"] = distill(replace(alike, output_dir=folder / "bidirectional"), device=device)
    return evaluate(
        replace(
            evaluation_config(folder.parent, heads["causal"]),
            bidirectional_head=heads["bidirectional"],
            output_dir=folder,
        )
    )


def _timed(folder: Path, name: str, stage: Any) -> Any:
    """Runs a stage and adds its minutes to ``times.json``."""
    started = time.monotonic()
    result = stage()
    path = folder / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    times[name] = round(times.get(name, 0.0) + (time.monotonic() - started) / 60, 1)
    path.write_text(json.dumps(times))
    return result


def write_held_out_prompts(path: Path, corpus_dir: Path, target: Path, num: int = NUM_HELD_OUT_PROMPTS) -> None:
    """Prompts of `PROMPT_TOKENS` tokens from library files of the test split, as evenly over files as these allow.

    Each starts at the beginning of a line, and its text encodes to its ids again.
    """
    if path.exists():
        return
    tokenizer = load_tokenizer(target)
    files = [f for f in json.loads((corpus_dir / "held_out.json").read_text()) if f["split"] == "test"]
    rng = np.random.default_rng(5)
    queues = [_windows_of(file["name"], file["text"], tokenizer, rng) for file in files]
    found: list[dict[str, Any]] = []
    while len(found) < num and any(queues):
        for queue in queues:
            if queue and len(found) < num:
                found.append(queue.pop())
    order = rng.permutation(len(found))
    path.write_text(json.dumps([found[i] for i in order]))


def _windows_of(name: str, text: str, tokenizer: Any, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Prompts that do not overlap within one file, in random order."""
    lines, prompts, at = text.splitlines(keepends=True), [], 0
    # Behind every prompt the file goes on for a while.
    while at < len(lines):
        rest = "".join(lines[at : at + 120])
        ids = tokenizer.encode(rest, add_special_tokens=False).ids
        if len(ids) < PROMPT_TOKENS + 96:
            break
        prompt = tokenizer.decode(ids[:PROMPT_TOKENS])
        if tokenizer.encode(prompt, add_special_tokens=False).ids == ids[:PROMPT_TOKENS] and "�" not in prompt:
            prompts.append({"name": f"{name}:{at + 1}", "text": prompt, "token_ids": ids[:PROMPT_TOKENS]})
        at += prompt.count("\n") + int(rng.integers(1, 12))
    rng.shuffle(prompts)
    return prompts


def export(folder: Path, head: Path, output: Path) -> None:
    """Copies target and head to where the package finds them, with prompts, evaluation and model card."""
    for name in ("target", "draft_head"):
        (output / name).mkdir(parents=True, exist_ok=True)
    for name, source in (("target", folder / "target"), ("draft_head", head)):
        for file in sorted(source.iterdir()):
            shutil.copyfile(file, output / name / file.name)
    shutil.copyfile(folder / "held_out_prompts.json", output / "held_out_prompts.json")
    write_model_card(folder, output, hardware())
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    Console().print(f"{output}: {size / 2**20:.1f} MiB")


def hardware() -> str:
    """The machine in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{machine().num_cores} cores of {machine().processor}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--train-dir", type=Path, default=Path("build/train"), help="everything on the way is kept here"
    )
    parser.add_argument("--target-minutes", type=float, default=126.0)
    parser.add_argument("--head-minutes", type=float, default=18.0)
    parser.add_argument("--comparison-minutes", type=float, default=2.0, help="per head; 0 leaves it out")
    given = parser.parse_args()
    run(
        given.train_dir,
        target_minutes=given.target_minutes,
        head_minutes=given.head_minutes,
        comparison_minutes=given.comparison_minutes,
    )


if __name__ == "__main__":
    main()
