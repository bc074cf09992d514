"""Trains a draft head: forward KL against the frozen target, over blocks at random anchors."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.training.features import Features
from jetflow_cluster.training.head_model import (
    Angles,
    TrainableHead,
    head_config_for,
    load_head,
    mask_token_of,
    save_head,
    taps_of,
    warm_start,
)
from jetflow_cluster.training.objective import accept_until_fail, depth_weights, soft_cross_entropy
from jetflow_cluster.training.optim import Optimizer, Progress, lr_factor
from jetflow_cluster.training.regenerate import (
    RegenerateConfig,
    Sequences,
    load_causal_lm,
    read_streams,
    regenerate,
    windows,
)
from jetflow_cluster.training.simulate import Rollouts, head_logits, make_rollouts, tables_along, walk
from jetflow_cluster.tree.build import build_trees

HELD_OUT_NODES = (16, 32)
#: Peak learning rates of matrices and of the rest, by optimizer.
PEAK_RATES = {"muon": (0.015, 1.5e-3), "adamw": (3e-3, 3e-3)}


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that decides a head."""

    #: Folder of the target checkpoint.
    target: Path
    #: Prompts or text: a folder written by `corpus.build`, a text file, or a JSON list of prompts.
    source: Path
    #: Folder for state, log, plot and, at the end, the head in ``draft_head/``.
    output_dir: Path
    #: Folder of the training sequences; None is ``data/`` in `output_dir`. Several runs may share one.
    data_dir: Path | None = None
    #: Prompts that the target continues, and windows of the text as it is.
    num_regenerated: int = 4096
    num_windows: int = 2048
    #: Tokens of a prompt, and of its continuation.
    prompt_tokens: int = 128
    new_tokens: int = 160
    #: Most minutes of generation.
    max_regenerate_minutes: float = 600.0
    #: Share of training blocks on regenerated text.
    regenerated_share: float = 2 / 3
    #: Layers of the head.
    num_layers: int = 2
    #: Anchor plus masks.
    block_size: int = 8
    #: Tapped target layers; None spreads three over the target as published heads do.
    target_layer_ids: tuple[int, ...] | None = None
    #: Token of the slots to be guessed; None is the tokenizer's mask token, or the last of the vocabulary.
    mask_token_id: int | None = None
    #: False trains a bidirectional DFlash head.
    causal: bool = True
    #: Start from the target's layers instead of random ones.
    warm_start: bool = True
    #: A head of the same shape to go on from, instead.
    init_head: Path | None = None
    #: ``muon`` (matrices; AdamW for the rest) or ``adamw``.
    optimizer: str = "adamw"
    #: Peak rates of matrices and of the rest; AdamW takes the second for all. None is what suits the optimizer.
    learning_rates: tuple[float, float] | None = None
    #: Weight of depth k is exp(-k / gamma); None weighs all the same.
    gamma: float | None = 4.0
    #: Count a block's depths only up to the head's first wrong guess (arXiv 2607.01893).
    accept_until_fail: bool = False
    #: Temperature of the KL.
    temperature: float = 1.0
    #: Share of the target's greedy token, instead of its distribution, in the teacher.
    greedy_share: float = 0.0
    #: Sequences per step, and blocks per sequence.
    num_sequences: int = 8
    num_anchors: int = 64
    #: End of the run, in minutes or blocks, whichever comes first.
    max_minutes: float = 20.0
    max_blocks: int = 10**9
    #: Share of the run with rising rates; cosine follows.
    warmup: float = 0.03
    #: Held-out prompts, and tokens of each, on which acceptance is measured while training.
    num_held_out: int = 32
    held_out_tokens: int = 64
    #: Minutes between such measurements.
    measure_every_minutes: float = 2.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.num_layers < 1:
            raise ValueError(f"block_size = {self.block_size}, num_layers = {self.num_layers}: need at least 2 and 1")
        if self.optimizer not in PEAK_RATES:
            raise ValueError(f"optimizer = {self.optimizer!r}: must be one of {', '.join(PEAK_RATES)}")
        if self.new_tokens <= self.block_size:
            raise ValueError(f"new_tokens = {self.new_tokens}: must exceed block_size = {self.block_size}")
        if self.gamma is not None and self.gamma <= 0:
            raise ValueError(f"gamma = {self.gamma}: must be above 0")

    @property
    def sequences_dir(self) -> Path:
        """Where the training sequences are."""
        return self.data_dir or self.output_dir / "data"

    def taps(self) -> tuple[int, ...]:
        """Tapped target layers. Raises ValueError if the target has no such ones."""
        return taps_of(TargetConfig.from_dir(self.target).num_layers, self.target_layer_ids)


def prepare(config: DistillConfig, *, device: str = "cpu") -> tuple[Sequences, Features]:
    """Training sequences and their features, made when they are not there yet."""
    made = regenerate(
        RegenerateConfig(
            target=config.target,
            output_dir=config.sequences_dir,
            source=config.source,
            num_regenerated=config.num_regenerated,
            num_windows=config.num_windows,
            prompt_tokens=config.prompt_tokens,
            new_tokens=config.new_tokens,
            max_minutes=config.max_regenerate_minutes,
            seed=config.seed,
        ),
        device=device,
    )
    return made, Features(made, config.target, config.taps(), config.temperature)


def held_out_rollouts(config: DistillConfig, sequences: Sequences | None, *, spare: int | None = None) -> Rollouts:
    """Greedy texts behind prompts that no training step sees."""
    if config.source.is_dir():
        stream = read_streams(config.source, config.target, "validation")
        prompts = windows((stream or [])[:1] and [(stream[0][0], 1.0)], config.num_held_out, config.prompt_tokens, 7)  # type: ignore[index]
    else:
        assert sequences is not None
        last = sequences.num_regenerated
        prompts = sequences.tokens[max(0, last - config.num_held_out) : last, : config.prompt_tokens]
    model = load_causal_lm(config.target, torch.float32)
    spare = spare or config.block_size - 1
    return make_rollouts(model, prompts, num_tokens=config.held_out_tokens, spare=spare, tap_ids=config.taps())


def held_out_acceptance(head: TrainableHead, rollouts: Rollouts) -> list[float]:
    """Tokens per step of exact trees with `HELD_OUT_NODES` nodes, marginal scores."""
    tables = [
        tables_along(head_logits(head, rollouts, p), rollouts, p, width=HELD_OUT_NODES[0] - 1)
        for p in range(rollouts.num_prompts)
    ]
    depth = head.config.block_size - 1

    def draft(prompt: int, at: int, budget: int) -> Any:
        return build_trees([tables[prompt][at]], [0], max_nodes=[budget], max_depths=[depth])[0]

    return walk(rollouts, draft, HELD_OUT_NODES).mean()


class _Batches:
    """Blocks at random anchors; batch i of a run is a pure function of the seed."""

    def __init__(self, config: DistillConfig, sequences: Sequences, features: Features):
        self._config, self._sequences, self._features = config, sequences, features
        held_out = 0 if config.source.is_dir() else config.num_held_out
        self._num_made = max(1, sequences.num_regenerated - held_out)

    def batch(self, step: int, device: str) -> dict[str, torch.Tensor]:
        """Tensors of one step, see `block_loss`."""
        config, made = self._config, self._sequences
        rng = np.random.default_rng((config.seed, step))
        num_windows = len(made) - made.num_regenerated
        share = config.regenerated_share if num_windows else 1.0
        own = rng.random(config.num_sequences) < share
        rows = np.where(
            own,
            rng.integers(0, self._num_made, config.num_sequences),
            made.num_regenerated + rng.integers(0, max(1, num_windows), config.num_sequences),
        )
        first, last = made.first[rows, None], made.last[rows, None]
        # One anchor in each of equal stretches: spread out, and seldom twice the same.
        at = (
            np.arange(config.num_anchors) + rng.random((config.num_sequences, config.num_anchors))
        ) / config.num_anchors
        anchors = first + np.floor(at * (last - first + 1)).astype(np.int64)
        tensors = {
            "taps": self._features.taps(rows),
            "mean_rows": self._features.mean_rows(rows),
            "labels": self._features.labels(rows),
            "entropy": self._features.entropy(rows),
            "ids": torch.from_numpy(made.tokens[rows].astype(np.int64)),
            "anchors": torch.from_numpy(anchors),
            "starts": torch.from_numpy(made.starts[rows]),
            "last": torch.from_numpy(made.last[rows]),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class _Frozen:
    """What the steps of a run share."""

    embedding: torch.Tensor
    output: torch.Tensor
    angles: Angles
    weights: torch.Tensor


def block_loss(
    head: TrainableHead, batch: dict[str, torch.Tensor], frozen: _Frozen, config: DistillConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of one step, and what to show of it.

    Args:
        head: the student.
        batch: ``taps`` ``[S, L, ..]``, ``mean_rows`` ``[S, L, H]``, ``labels``, ``entropy`` and ``ids`` ``[S, L]``,
            ``anchors`` ``[S, A]``, ``starts`` and ``last`` ``[S]``.
        frozen: embedding and output layer of the target (bf16), angles and depth weights.
        config: temperature, accept-until-fail and the share of greedy labels.

    Returns:
        The loss, and fp32 ``[3]``: mean KL in nats, top-1 at depth 1, and tokens per step of a chain on this text.
    """
    ids, anchors = batch["ids"], batch["anchors"]
    num_depths = head.config.block_size - 1
    steps = torch.arange(1, num_depths + 1, device=ids.device)
    guessed = anchors[:, :, None] + steps
    valid = (guessed <= batch["last"][:, None, None] + 1).float()
    guessed = guessed.clamp(max=ids.shape[1] - 1).flatten(1)
    blocks = torch.full((*anchors.shape, num_depths + 1), head.config.mask_token_id, device=ids.device)
    blocks = torch.cat((ids.gather(1, anchors)[:, :, None], blocks[:, :, 1:]), -1)
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        embeds = frozen.embedding[blocks].float()
        hidden = head(batch["taps"], embeds, anchors, batch["starts"], frozen.angles)
    size = hidden.shape[-1]
    teacher = batch["mean_rows"].gather(1, (guessed - 1)[:, :, None].expand(-1, -1, size)).flatten(0, 1)
    if config.greedy_share:
        greedy = frozen.output[batch["labels"].gather(1, guessed - 1).flatten()]
        teacher = torch.lerp(teacher.float(), greedy.float(), config.greedy_share)
    losses, best = soft_cross_entropy(hidden.flatten(0, 2) / config.temperature, frozen.output, teacher)
    losses, best = losses.view_as(valid), best.view(valid.shape)
    truth = ids.gather(1, guessed).view(valid.shape)
    weights = frozen.weights * valid
    entropy = batch["entropy"].gather(1, guessed - 1).view_as(valid)
    with torch.no_grad():
        right = (best == truth).float() * valid
        kl = ((losses - entropy) * valid).sum() / valid.sum()
        shown = torch.stack((kl, right[..., 0].mean(), 1 + right.cumprod(-1).sum(-1).mean()))
    if config.accept_until_fail:
        weights = weights * accept_until_fail(best, truth)
    return config.temperature**2 * (losses * weights).sum() / weights.sum(), shown


def distill(config: DistillConfig, *, device: str = "cpu", state_every_s: float = 180.0) -> Path:
    """Trains, or goes on where an interrupted run stopped; returns the head's folder.

    Writes ``state.pt``, ``distill.csv``, ``distill.png`` and ``draft_head/``.
    """
    folder = config.output_dir / "draft_head"
    if (folder / "config.json").exists():
        return folder
    config.output_dir.mkdir(parents=True, exist_ok=True)
    sequences, features = prepare(config, device=device)
    run = _Run(config, sequences, features, device)
    run.resume()
    run.train(state_every_s)
    save_head(folder, run.head)
    from jetflow_cluster.training.plots import plot_distillation

    plot_distillation(config.output_dir / "distill.csv", config.output_dir / "distill.png")
    return folder


class _Run:
    """One run of training and its state."""

    def __init__(self, config: DistillConfig, sequences: Sequences, features: Features, device: str):
        self._config, self._device = config, device
        self._console = Console()
        target = load_causal_lm(config.target, torch.float32)
        torch.manual_seed(config.seed)
        self.head = TrainableHead(
            head_config_for(
                TargetConfig.from_dir(config.target),
                num_layers=config.num_layers,
                block_size=config.block_size,
                target_layer_ids=config.taps(),
                mask_token_id=mask_token_of(config.target, config.mask_token_id),
                causal=config.causal,
            )
        )
        if config.init_head is not None:
            self.head.load_state_dict(load_head(config.init_head, wanted=self.head.config).state_dict())
        elif config.warm_start:
            warm_start(self.head, target.state_dict(), seed=config.seed)
        self.head.to(device)
        self._frozen = _Frozen(
            embedding=target.get_input_embeddings().weight.detach().to(device, torch.bfloat16),
            output=target.lm_head.weight.detach().to(device, torch.bfloat16),
            angles=self.head.angles(sequences.length + config.block_size, torch.device(device)),
            weights=depth_weights(config.block_size - 1, config.gamma).to(device),
        )
        del target
        self._rollouts = held_out_rollouts(config, sequences)
        self._batches = _Batches(config, sequences, features)
        matrix_lr, other_lr = config.learning_rates or PEAK_RATES[config.optimizer]
        self._optimizer = Optimizer(
            self.head.named_parameters(), kind=config.optimizer, matrix_lr=matrix_lr, other_lr=other_lr
        )
        self._step, self._blocks, self._spent_s = 0, 0, 0.0
        self._state_path = config.output_dir / "state.pt"

    def resume(self) -> None:
        """Takes up a state that an interrupted run left."""
        if not self._state_path.exists():
            return
        state = torch.load(self._state_path, map_location=self._device, weights_only=True)
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step, self._blocks, self._spent_s = state["step"], state["blocks"], state["spent_s"]
        self._console.print(f"resumed at step {self._step}")

    def _save(self, progress: Progress) -> None:
        state: dict[str, Any] = {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict()}
        state |= {"step": self._step, "blocks": progress.tokens, "spent_s": progress.seconds()}
        scratch = self._state_path.with_suffix(".new")
        torch.save(state, scratch)
        scratch.replace(self._state_path)

    def train(self, state_every_s: float) -> None:
        """To the end of the run. Compilation, done first, is not counted as training time."""
        config = self._config
        compiled = torch.compile(block_loss, dynamic=False)
        compiled(self.head, self._batches.batch(0, self._device), self._frozen, config)[0].backward()
        self.head.zero_grad(set_to_none=True)
        progress = Progress(max_tokens=config.max_blocks, max_minutes=config.max_minutes)
        progress.tokens, progress.spent_s = self._blocks, self._spent_s
        shown_at = saved_at = measured_at = progress.seconds()
        average: torch.Tensor | None = None
        with (config.output_dir / "distill.csv").open("a", newline="") as handle:
            log = csv.writer(handle)
            while (fraction := progress.fraction()) < 1.0:
                batch = self._batches.batch(self._step, self._device)
                loss, shown = compiled(self.head, batch, self._frozen, config)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
                self._optimizer.step(lr_factor(fraction, warmup=config.warmup, decay_from=None))
                self._step += 1
                progress.tokens += batch["anchors"].numel()
                seen = torch.cat((loss.detach()[None], shown))
                average = seen if average is None else torch.lerp(average, seen, 0.04)
                now = progress.seconds()
                if now - measured_at > 60 * config.measure_every_minutes or progress.fraction() >= 1.0:
                    # Measuring costs the run no time.
                    acceptance = self._measure()
                    measured_at = now
                    progress.spent_s -= progress.seconds() - now
                elif now - shown_at > 20:
                    acceptance = [math.nan] * len(HELD_OUT_NODES)
                else:
                    continue
                shown_at = now
                self._report(log, average, acceptance, now, progress)
                handle.flush()
                if now - saved_at > state_every_s:
                    saved_at = now
                    self._save(progress)
        self._save(progress)

    def _measure(self) -> list[float]:
        head = TrainableHead(self.head.config)
        head.load_state_dict({n: t.detach().cpu() for n, t in self.head.state_dict().items()})
        return held_out_acceptance(head.eval(), self._rollouts)

    def _report(self, log: Any, average: torch.Tensor, acceptance: list[float], now: float, progress: Progress) -> None:
        loss, kl, top1, chain = average.tolist()
        numbers = [loss, kl, top1, chain, *acceptance]
        log.writerow([self._step, progress.tokens, round(now, 1), *(round(x, 4) for x in numbers)])
        text = f"{progress.fraction():6.1%}  step {self._step}  loss {loss:.3f}  KL {kl:.3f}  top-1 {top1:.3f}"
        if not math.isnan(acceptance[0]):
            pairs = zip(HELD_OUT_NODES, acceptance, strict=True)
            text += "  held out: " + ", ".join(f"{a:.2f} at {n} nodes" for n, a in pairs)
        self._console.print(text, highlight=False)
