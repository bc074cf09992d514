"""The commands that train and judge draft heads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jetflow_cluster import cli_options as opt
from jetflow_cluster.console import stdout

if TYPE_CHECKING:
    from jetflow_cluster.training.distill import DistillConfig


class HeadOptimizer(StrEnum):
    """What trains a head's matrices."""

    MUON = "muon"
    ADAMW = "adamw"


_DATA, _HEAD, _RUN = "Training text", "Head", "Run"


def _option(panel: str, text: str, *names: str, low: float | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, min=low)


Source = Annotated[Path, typer.Argument(help="A text file, a JSON list of prompts, or a corpus folder.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for state, log, plot and draft_head/.")]
SideCarOnly = Annotated[
    bool, typer.Option("--sidecar", help="Train the side-car of a finished head instead; the head stays as it is.")
]

DISTILL_EXAMPLES = (
    "Examples:\n\n  jetflow distill my_code.txt --model folder/of/target --output out/head --minutes 30\n\n"
    "  jetflow distill my_code.txt --model folder/of/target --output out/head --sidecar\n\n"
    "Then:\n\n  jetflow evaluate-head --model folder/of/target --draft-head out/head/draft_head --prompts held_out.json"
)


def distill(
    source: Source,
    output: Output,
    model: opt.Model = None,
    draft_head: Annotated[
        Path | None, _option(_HEAD, "The head whose side-car is trained; without it, draft_head/ of the output.")
    ] = None,
    sidecar: SideCarOnly = False,
    num_regenerated: Annotated[int | None, _option(_DATA, "Prompts that the target continues.", low=0)] = None,
    num_windows: Annotated[int | None, _option(_DATA, "Windows of the text as it is.", low=0)] = None,
    prompt_tokens: Annotated[int | None, _option(_DATA, "Tokens of a prompt.", low=1)] = None,
    new_tokens: Annotated[int | None, _option(_DATA, "Tokens of its continuation.", low=1)] = None,
    num_layers: Annotated[int | None, _option(_HEAD, "Layers of the head.", low=1)] = None,
    block_size: Annotated[int | None, _option(_HEAD, "The anchor and the tokens guessed at once.", low=2)] = None,
    taps: Annotated[str | None, _option(_HEAD, "Target layers to read, by comma; without it, three spread.")] = None,
    mask_token_id: Annotated[int | None, _option(_HEAD, "Token of the slots to be guessed.", low=0)] = None,
    bidirectional: Annotated[bool, _option(_HEAD, "Let slots of a block see later ones.", "--bidirectional")] = False,
    rank: Annotated[int | None, _option(_HEAD, "Rank of the side-car.", low=1)] = None,
    warm_start: Annotated[bool | None, _option(_RUN, "Start from the target's layers, or at random.")] = None,
    init_head: Annotated[Path | None, _option(_RUN, "Go on from this head, of the same shape, instead.")] = None,
    optimizer: Annotated[HeadOptimizer | None, _option(_RUN, "For matrices; AdamW trains the rest.")] = None,
    gamma: Annotated[
        float | None, _option(_RUN, "Depth k weighs exp(-k / gamma); 0 weighs all depths alike.", low=0)
    ] = None,
    accept_until_fail: Annotated[bool | None, _option(_RUN, "Count depths up to the first wrong guess.")] = None,
    minutes: Annotated[float | None, _option(_RUN, "Most minutes of training.", low=0)] = None,
    device: opt.Device = "auto",
    seed: Annotated[int, _option(_RUN, "Seed of data and weights.", low=0)] = 0,
) -> None:
    """Train a draft head for a target, or the side-car of one; an interrupted run goes on where it stopped.

    What is not given is as in the recipe of the embedded head.
    """
    from jetflow_cluster.training import distill as training

    head_dir = draft_head if draft_head is not None else output / "draft_head"
    given: dict[str, Any] = {
        "num_regenerated": num_regenerated,
        "num_windows": num_windows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "num_layers": num_layers,
        "block_size": block_size,
        "target_layer_ids": _taps_of(head_dir) if sidecar else opt.read_numbers("taps", taps) if taps else None,
        "mask_token_id": mask_token_id,
        "causal": False if bidirectional else None,
        "warm_start": warm_start,
        "init_head": init_head,
        "optimizer": optimizer.value if optimizer is not None else None,
        "accept_until_fail": accept_until_fail,
        "max_minutes": None if sidecar else minutes,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if gamma is not None:
        chosen["gamma"] = gamma or None
    config = training.DistillConfig(target=_target_dir(model), source=source, output_dir=output, seed=seed, **chosen)
    if sidecar:
        _train_sidecar(config, head_dir, rank=rank, minutes=minutes, device=_device(device))
    else:
        stdout.print(f"wrote {training.distill(config, device=_device(device))}")


def _train_sidecar(
    config: DistillConfig, head_dir: Path, *, rank: int | None, minutes: float | None, device: str
) -> None:
    from jetflow_cluster.training.calibration import calibration_rollouts, fit_sharpness
    from jetflow_cluster.training.sidecar_training import SideCarTrainingConfig, train_sidecar

    given: dict[str, Any] = {"rank": rank, "max_minutes": minutes}
    chosen = {name: value for name, value in given.items() if value is not None}
    folder = train_sidecar(
        SideCarTrainingConfig(distill=config, head=head_dir, seed=config.seed, **chosen), device=device
    )
    sharpness = fit_sharpness(folder, calibration_rollouts(config))
    stdout.print(f"wrote the side-car in {folder}, sharpness {sharpness}")


EVALUATE_EXAMPLES = (
    "Examples:\n\n  jetflow evaluate-head --output out/acceptance\n\n"
    "  jetflow evaluate-head --draft-head out/head/draft_head --budgets 8,32 --temperatures 0 --output out/quick"
)


def evaluate_head(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for acceptance.json, .md and .png.")],
    model: opt.Model = None,
    draft_head: opt.DraftHead = None,
    bidirectional_head: Annotated[
        Path | None, typer.Option(help="A bidirectional head that was trained alike, to compare with.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON list of prompts; without it, the held-out ones.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 120,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each; shorter prompts are left out.")] = 128,
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are walked behind each prompt.")] = 96,
    budgets: Annotated[str, typer.Option(help="Nodes per tree, by comma.")] = "8,16,32,64,128,256",
    temperatures: Annotated[str, typer.Option(help="By comma; 0 is greedy.")] = "0,1",
) -> None:
    """Compare drafters by tokens per step: head, chain, trees, side-car, prompt lookup, at several budgets."""
    from jetflow_cluster.bench.prompts import HELD_OUT_PROMPTS
    from jetflow_cluster.training.evaluate import EvaluateConfig, evaluate

    nodes, noise = opt.read_numbers("budgets", budgets), opt.read_floats("temperatures", temperatures)
    evaluate(
        EvaluateConfig(
            target=_target_dir(model),
            head=_head_dir(draft_head, has_own_target=model is not None),
            prompts=prompts if prompts is not None else HELD_OUT_PROMPTS,
            output_dir=output,
            bidirectional_head=bidirectional_head,
            num_prompts=num_prompts,
            prompt_tokens=prompt_tokens,
            num_tokens=num_tokens,
            budgets=nodes,
            temperatures=noise,
        )
    )
    stdout.print(f"wrote {output / 'acceptance.json'}, {output / 'acceptance.md'} and {output / 'acceptance.png'}")


def _target_dir(model: str | None) -> Path:
    return _checkpoint(model, "target")


def _head_dir(draft_head: str | None, *, has_own_target: bool) -> Path:
    if draft_head is None and has_own_target:
        raise ValueError("draft_head = None: a head for this model is needed")
    return _checkpoint(draft_head, "draft_head")


def _checkpoint(path_or_id: str | None, embedded: str) -> Path:
    from jetflow_cluster.bench.prompts import DEFAULT_CHECKPOINT
    from jetflow_cluster.models.hub import resolve_checkpoint

    if path_or_id is not None:
        return resolve_checkpoint(path_or_id)
    folder = DEFAULT_CHECKPOINT / embedded
    if not folder.is_dir():
        raise FileNotFoundError(f"the embedded {embedded.replace('_', ' ')} is not installed at {folder}")
    return folder


def _taps_of(head_dir: Path) -> tuple[int, ...]:
    from jetflow_cluster.models.draft_head import DraftHeadConfig

    return tuple(DraftHeadConfig.from_dir(head_dir).target_layer_ids)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
