"""Pre-training of the embedded target: a small Qwen3-architecture model of Python code."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from jetflow_cluster.training.corpus import END_OF_TEXT, MASK_TOKEN, MIXTURE, VOCAB_SIZE
from jetflow_cluster.training.loops import discourage_loops
from jetflow_cluster.training.optim import Optimizer, Progress, lr_factor

END_OF_TEXT_ID = 0
MASK_ID = 1


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides a pre-training run."""

    #: Folder written by `corpus.build`.
    corpus_dir: Path
    #: Folder for the training state and, at the end, the checkpoint in ``target/``.
    output_dir: Path
    #: Tokens of the whole run; the schedule ends there or at `max_minutes`.
    max_tokens: int = 40_000_000
    #: Minutes of the whole run, interrupted parts included.
    max_minutes: float = 60.0
    #: Minutes of `discourage_loops` behind it.
    loop_minutes: float = 4.5
    #: Weight of the model behind that in the average with the model before it (arXiv 2109.01903): the average loops
    #: less than the one and knows more than the other.
    loop_share: float = 0.3
    #: Hidden size of the model.
    hidden_size: int = 384
    #: Decoder layers.
    num_layers: int = 8
    #: Width of the SwiGLU layer.
    intermediate_size: int = 1280
    #: Query heads and KV heads; both divide by 4, so the model runs at TP 1, 2 and 4.
    num_heads: tuple[int, int] = (4, 4)
    #: Tokens per optimizer step.
    batch_tokens: int = 4096
    #: Window length, and the longer one of the last `long_share` of the run.
    sequence_lengths: tuple[int, int] = (512, 1024)
    #: Share of the run that trains on the longer windows.
    long_share: float = 0.12
    #: Peak rates: Muon for matrices, AdamW for the rest.
    learning_rates: tuple[float, float] = (0.02, 3e-3)
    #: Where linear decay to zero starts.
    decay_from: float = 0.4
    #: Windows with a smaller share of distinct 4-grams are not trained on: they teach a small model to loop.
    least_distinct_4grams: float = 0.6
    #: Seed of weights and data order.
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_minutes", "loop_minutes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        for name in ("loop_share", "least_distinct_4grams"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1]")


def distinct_4grams(ids: Sequence[int] | np.ndarray) -> float:
    """Share of distinct 4-grams among all of one text; 1 for texts without any."""
    ids = np.asarray(ids, dtype=np.int64)
    if len(ids) < 4:
        return 1.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, 4)
    return len(np.unique(grams @ (1 << np.array([48, 32, 16, 0])))) / len(grams)


class _Windows:
    """Random windows of the training part; the windows of a step are a pure function of the seed."""

    def __init__(self, config: PretrainConfig):
        folder = config.corpus_dir
        self._parts = [np.memmap(folder / f"train.{s}.bin", dtype=np.uint16, mode="r") for s in MIXTURE]
        self._shares = np.array(list(MIXTURE.values()))
        self._least_distinct = config.least_distinct_4grams
        self._seed = config.seed

    def batch(self, step: int, rows: int, length: int) -> torch.Tensor:
        """int64 ids ``[rows, length]``."""
        rng = np.random.default_rng((self._seed, step))
        out = np.empty((rows, length), dtype=np.int64)
        for i, which in enumerate(rng.choice(len(self._parts), size=rows, p=self._shares)):
            part = self._parts[which]
            while True:
                start = int(rng.integers(0, len(part) - length))
                out[i] = part[start : start + length]
                if distinct_4grams(out[i]) >= self._least_distinct:
                    break
        return torch.from_numpy(out)


def build_model(config: PretrainConfig) -> Any:
    """A randomly initialised `Qwen3ForCausalLM` in fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(config.seed)
    heads, kv_heads = config.num_heads
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            intermediate_size=config.intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=config.sequence_lengths[1],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None,
            eos_token_id=END_OF_TEXT_ID,
            pad_token_id=END_OF_TEXT_ID,
        )
    )


def _token_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = F.linear(hidden, model.lm_head.weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: Any, corpus_dir: Path, split: str, source: str, max_tokens: int = 10**9) -> float:
    """Mean bits per byte of UTF-8 text over one part, in windows of 512 tokens with half overlap.

    Every token but the first is scored once, with 256 to 511 tokens of context where the part has them.
    """
    part = np.fromfile(corpus_dir / f"{split}.{source}.bin", dtype=np.uint16).astype(np.int64)
    total = json.loads((corpus_dir / "corpus.json").read_text())["totals"][f"{split}.{source}"]
    share = min(1.0, max_tokens / part.size)
    ids = torch.from_numpy(part[: int(part.size * share)])
    device = next(model.parameters()).device
    nats, scored, window, stride = 0.0, 0, 512, 256
    model.eval()
    starts = list(range(0, max(1, len(ids) - stride), stride))
    for first in range(0, len(starts), 8):
        rows = [ids[s : s + window] for s in starts[first : first + 8]]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).to(device)
        logits = model(input_ids=padded.clamp(min=0), use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none", ignore_index=-100)
        losses = losses.view(padded.shape[0], -1)
        for row, start in enumerate(starts[first : first + 8]):
            begin = 0 if start == 0 else window - stride - 1
            count = len(rows[row]) - 1 - begin
            nats += float(losses[row, begin : begin + count].sum())
            scored += count
    model.train()
    tokens_per_byte = total["tokens"] / total["bytes"]
    return nats / scored / math.log(2) * tokens_per_byte


def pretrain(config: PretrainConfig, *, device: str = "cpu", state_every_s: float = 240.0) -> Path:
    """Trains, or goes on where an interrupted run stopped; returns the checkpoint's folder.

    Writes ``state.pt`` while running, ``loss.csv``, ``report.json``, and a Hugging Face checkpoint in ``target/``
    (bf16).
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    console = Console()
    model = build_model(config).to(device)
    heads_lr, others_lr = config.learning_rates
    optimizer = Optimizer(model.named_parameters(), kind="muon", matrix_lr=heads_lr, other_lr=others_lr)
    progress = Progress(max_tokens=config.max_tokens, max_minutes=config.max_minutes)
    step = 0
    state_path = config.output_dir / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, progress.tokens, progress.spent_s = state["step"], state["tokens"], state["spent_s"]
        console.print(f"resumed at step {step}, {progress.tokens / 1e6:.2f} M tokens")
    windows = _Windows(config)
    loss_of = torch.compile(_token_loss, dynamic=False)
    saved_at = shown_at = progress.seconds()
    running = math.nan
    with (config.output_dir / "loss.csv").open("a", newline="") as handle:
        log = csv.writer(handle)
        while (fraction := progress.fraction()) < 1.0:
            length = config.sequence_lengths[fraction > 1 - config.long_share]
            ids = windows.batch(step, config.batch_tokens // length, length).to(device)
            loss = loss_of(model, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(lr_factor(fraction, warmup=0.01, decay_from=config.decay_from))
            step += 1
            progress.tokens += ids.numel()
            value = float(loss.detach())
            running = value if math.isnan(running) else 0.98 * running + 0.02 * value
            now = progress.seconds()
            if now - shown_at > 30:
                shown_at = now
                log.writerow([step, progress.tokens, round(now, 1), round(running, 4)])
                handle.flush()
                rate = progress.tokens / now
                console.print(f"{fraction:6.1%}  step {step}  loss {running:.3f}  {rate:.0f} tok/s", highlight=False)
            if now - saved_at > state_every_s:
                saved_at = now
                _save_state(state_path, model, optimizer, step, progress)
    _save_state(state_path, model, optimizer, step, progress)
    report = {"tokens": progress.tokens, "minutes": round(progress.seconds() / 60, 1)}
    report |= _average_without_loops(config, model, windows, device)
    folder = _save_checkpoint(config, model)
    (config.output_dir / "report.json").write_text(json.dumps(report, indent=1))
    return folder


def _average_without_loops(config: PretrainConfig, model: Any, windows: _Windows, device: str) -> dict[str, Any]:
    """Trains against loops and averages with the weights before it, in place; returns what to report."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    repeated = discourage_loops(model, windows.batch, max_minutes=config.loop_minutes, device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(before[name], 1 - config.loop_share)
    return {
        "loop_minutes": config.loop_minutes,
        "loop_share": config.loop_share,
        "share_of_repeated_tokens": [round(share, 4) for share in repeated],
    }


def _save_state(path: Path, model: Any, optimizer: Optimizer, step: int, progress: Progress) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    state |= {"tokens": progress.tokens, "spent_s": progress.seconds()}
    scratch = path.with_suffix(".new")
    torch.save(state, scratch)
    scratch.replace(path)


def _save_checkpoint(config: PretrainConfig, model: Any) -> Path:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    with torch.no_grad():
        # A row no text ever used has a norm that derails the draft head; the mean row does not.
        embedding = model.model.embed_tokens.weight
        embedding[MASK_ID] = embedding[torch.arange(len(embedding)) != MASK_ID].mean(0)
    # Rounded weights are the target from here on.
    model.to(torch.bfloat16)
    folder = config.output_dir / "target"
    model.generation_config = GenerationConfig(eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(config.corpus_dir / "tokenizer.json"),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=config.sequence_lengths[1],
    ).save_pretrained(folder)
    return folder
