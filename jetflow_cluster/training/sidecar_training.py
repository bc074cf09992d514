"""Trains the side-car of a frozen head: a low-rank correction of each guess by the token before it."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from jetflow_cluster.models.sidecar import SideCar, SideCarConfig, fingerprint, save_sidecar
from jetflow_cluster.training.distill import DistillConfig, prepare
from jetflow_cluster.training.head_model import TrainableHead, load_head
from jetflow_cluster.training.optim import lr_factor
from jetflow_cluster.training.regenerate import load_causal_lm


@dataclass(frozen=True, kw_only=True)
class SideCarTrainingConfig:
    """Everything that decides a side-car."""

    #: How the head was trained; its target and its training sequences are used.
    distill: DistillConfig
    #: Folder of the frozen head; the side-car's files are put beside it.
    head: Path
    #: Columns of the factors.
    rank: int = 64
    #: Candidates per depth that are corrected in use, and in training.
    width: int = 16
    train_width: int = 32
    #: Blocks whose guesses are gathered, and the most minutes for that.
    max_blocks: int = 400_000
    max_gather_minutes: float = 3.5
    #: Minutes of training on them.
    max_minutes: float = 1.5
    #: Guesses per step.
    batch_size: int = 8192
    learning_rate: float = 5e-3
    #: Share of steps with a rising rate; cosine follows.
    warmup: float = 0.02
    seed: int = 0


@dataclass(kw_only=True)
class Guesses:
    """Candidates of depths 2 and deeper, with the token that really came before; N of them."""

    #: int64 ``[N]``.
    parents: torch.Tensor
    #: int32 ``[N, train_width]``.
    children: torch.Tensor
    #: Log-probabilities of head and target over the candidates and, last, all other tokens,
    #: fp32 ``[N, train_width + 1]``.
    head: torch.Tensor
    target: torch.Tensor


def train_sidecar(config: SideCarTrainingConfig, *, device: str = "cpu") -> Path:
    """Trains the side-car and writes it beside the head; returns the head's folder.

    Writes ``sidecar.csv`` (step, KL before and behind the correction) to the distillation's folder as well.
    """
    console = Console()
    torch.manual_seed(config.seed)
    head = load_head(config.head)
    model = load_causal_lm(config.distill.target, torch.float32)
    embedding = model.get_input_embeddings().weight.detach()
    started = time.monotonic()
    blocks = _random_blocks(config, head, embedding, model.lm_head.weight.detach(), device=device)
    guesses = gather_guesses(config, blocks)
    console.print(f"{len(guesses.parents)} guesses in {time.monotonic() - started:.0f} s")
    config.distill.output_dir.mkdir(parents=True, exist_ok=True)
    sidecar = fit(config, guesses, embedding.shape[0], config.distill.output_dir / "sidecar.csv")
    state = dict(load_head(config.head).state_dict())
    described = SideCarConfig(
        rank=config.rank,
        width=config.width,
        target_fingerprint=fingerprint({"embedding": embedding}),
        head_fingerprint=fingerprint(state),
    )
    save_sidecar(config.head, SideCar(described, sidecar["parent"], sidecar["child"]))
    return config.head


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Random blocks of the training sequences as the frozen head and the target see them; B of them, D depths, row
    d - 1 is depth d."""

    #: Log-probabilities of head and target (behind the text as it is), fp32 ``[B, D, V]``.
    head: torch.Tensor
    target: torch.Tensor
    #: The token before each depth, int64 ``[B, D]``.
    parents: torch.Tensor
    #: Whether the sequence goes that far, bool ``[B, D]``.
    valid: torch.Tensor


def _random_blocks(
    config: SideCarTrainingConfig, head: TrainableHead, embedding: torch.Tensor, output: torch.Tensor, *, device: str
) -> Iterator[_Blocks]:
    """Endless; sequences and anchors as in the head's training."""
    sequences, features = prepare(config.distill, device=device)
    head = head.to(device).eval()
    size, num_anchors, num_rows = head.config.block_size, config.distill.num_anchors, config.distill.num_sequences
    angles = head.angles(sequences.length + size, torch.device(device))
    low_embedding, low_output = (t.to(device, torch.bfloat16) for t in (embedding, output))
    rng = np.random.default_rng((config.seed, 99))
    while True:
        share = config.distill.regenerated_share if len(sequences) > sequences.num_regenerated else 1.0
        own_rows = rng.integers(0, sequences.num_regenerated, num_rows)
        windows = rng.integers(min(sequences.num_regenerated, len(sequences) - 1), len(sequences), num_rows)
        rows = np.where(rng.random(num_rows) < share, own_rows, windows)
        first, last = sequences.first[rows, None], sequences.last[rows, None]
        at = (np.arange(num_anchors) + rng.random((num_rows, num_anchors))) / num_anchors
        anchors = torch.from_numpy(first + np.floor(at * (last - first + 1)).astype(np.int64)).to(device)
        ids = torch.from_numpy(sequences.tokens[rows].astype(np.int64)).to(device)
        starts = torch.from_numpy(sequences.starts[rows]).to(device)
        blocks = torch.full((*anchors.shape, size), head.config.mask_token_id, device=device)
        blocks = torch.cat((ids.gather(1, anchors)[:, :, None], blocks[:, :, 1:]), -1)
        with torch.inference_mode():
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                hidden = head(features.taps(rows).to(device), low_embedding[blocks].float(), anchors, starts, angles)
            own = (hidden.to(low_output.dtype) @ low_output.T).float().log_softmax(-1)
            theirs = (features.final(rows).to(device) @ low_output.T).float().log_softmax(-1)
        before = anchors[:, :, None] + torch.arange(size - 1, device=device)
        flat = before.clamp(max=ids.shape[1] - 1).flatten(1)
        yield _Blocks(
            head=own.flatten(0, 1),
            target=theirs.gather(1, flat[:, :, None].expand(-1, -1, theirs.shape[-1])).view(-1, *own.shape[2:]),
            parents=ids.gather(1, flat).view(-1, size - 1),
            valid=(before <= torch.from_numpy(last).to(device)[:, :, None]).flatten(0, 1),
        )


@torch.inference_mode()
def gather_guesses(config: SideCarTrainingConfig, blocks: Iterator[_Blocks]) -> Guesses:
    """Candidates of random blocks: of every other block the most probable, of the rest a draw without replacement,
    for the candidates of sampled requests are such."""
    deadline = time.monotonic() + 60 * config.max_gather_minutes
    parts: list[tuple[torch.Tensor, ...]] = []
    num_blocks = 0
    while num_blocks < config.max_blocks and (time.monotonic() < deadline or not parts):
        found = next(blocks)
        ranked = found.head[:, 1:].clone()
        ranked[::2] += _gumbel(ranked[::2])
        best = ranked.topk(config.train_width).indices
        keep = found.valid[:, 1:]
        values, teacher = (_with_rest(rows[:, 1:].gather(-1, best)[keep]) for rows in (found.head, found.target))
        parts.append((found.parents[:, 1:][keep].cpu(), best[keep].int().cpu(), values, teacher))
        num_blocks += len(ranked)
    parents, children, own, theirs = (torch.cat(column) for column in zip(*parts, strict=True))
    return Guesses(parents=parents, children=children, head=own, target=theirs)


def _gumbel(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like).exponential_().log_().neg_()


def _with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
    joint = torch.cat((logprobs, rest), -1).cpu()
    return joint - joint.logsumexp(-1, keepdim=True)


def corrected(parent: torch.Tensor, child: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[N, width + 1]`` behind the correction.

    Args:
        parent: rows of the parents, ``[N, rank]``.
        child: rows of the candidates, ``[N, width, rank]``.
        head: of the head, as in `Guesses`. The mass of all other tokens keeps its weight.
    """
    delta = (child @ parent[:, :, None])[..., 0]
    return (head + F.pad(delta, (0, 1))).log_softmax(-1)


def fit(config: SideCarTrainingConfig, guesses: Guesses, vocab_size: int, log_path: Path) -> dict[str, torch.Tensor]:
    """KL of the target against the corrected head; ``parent`` and ``child``, fp32 ``[V, rank]`` each."""
    generator = torch.Generator().manual_seed(config.seed)
    parent = nn.Parameter(torch.empty(vocab_size, config.rank).normal_(std=0.1, generator=generator))
    child = nn.Parameter(torch.empty(vocab_size, config.rank).normal_(std=0.1, generator=generator))
    optimizer = torch.optim.AdamW([parent, child], lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    num = len(guesses.parents)
    # The last guesses are held out, to see over-fitting.
    num_train = num - min(num // 20, 20_000)
    console, started, step = Console(), time.monotonic(), 0
    shown_at = started
    with log_path.open("w", newline="") as handle:
        log = csv.writer(handle)
        while (fraction := (time.monotonic() - started) / (60 * config.max_minutes)) < 1:
            rows = torch.randint(0, num_train, (config.batch_size,), generator=generator)
            loss = _kl(guesses, rows, parent, child)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * lr_factor(fraction, warmup=config.warmup, decay_from=None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if time.monotonic() - shown_at > 10:
                shown_at = time.monotonic()
                with torch.no_grad():
                    held_out = torch.arange(num_train, num)
                    plain = _kl(guesses, held_out, torch.zeros_like(parent), child)
                    numbers = [float(plain), float(_kl(guesses, held_out, parent, child)), float(loss)]
                log.writerow([step, *(round(x, 4) for x in numbers)])
                console.print(
                    f"{fraction:6.1%}  step {step}  KL {numbers[2]:.3f}, held out {numbers[1]:.3f} "
                    f"(uncorrected {numbers[0]:.3f})",
                    highlight=False,
                )
    return {"parent": parent.detach(), "child": child.detach()}


def _kl(guesses: Guesses, rows: torch.Tensor, parent: torch.Tensor, child: torch.Tensor) -> torch.Tensor:
    candidates = guesses.children[rows]
    ours = corrected(F.embedding(guesses.parents[rows], parent), F.embedding(candidates, child), guesses.head[rows])
    theirs = guesses.target[rows]
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()
