"""Training sequences for a draft head: prompts continued by the target itself, and windows of the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

Stream = np.ndarray
#: fp32 logits ``[R, V]`` and the position of the token to be chosen, to ids ``[R]``.
Choose = Callable[[torch.Tensor, int], torch.Tensor]

#: Shares of a corpus's parts among prompts and windows: what users complete is library code.
CORPUS_SHARES = {"library": 0.75, "tests": 0.15, "documentation": 0.10}


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig:
    """Which sequences are made."""

    #: Folder of the target checkpoint.
    target: Path
    #: Folder for ``tokens.bin`` and ``data.json``.
    output_dir: Path
    #: Where prompts come from: a folder written by `corpus.build`, a text file, or a JSON list of prompts (texts,
    #: or objects with ``text``).
    source: Path
    #: Prompts that the target continues.
    num_regenerated: int = 4096
    #: Windows of the text as it is; a list of prompts gives none.
    num_windows: int = 2048
    #: Tokens of each prompt; shorter ones are padded at the left.
    prompt_tokens: int = 128
    #: Tokens that the target adds.
    new_tokens: int = 160
    #: Temperatures, taken in turn; 0 is greedy.
    temperatures: tuple[float, ...] = (0.0, 0.7)
    #: Sequences that are continued together.
    batch_size: int = 256
    #: Most minutes of generation; what was made until then is used. Checked between batches.
    max_minutes: float = 600.0
    #: Decides windows and sampling.
    seed: int = 0


def read_streams(source: Path, target: Path, split: str = "train") -> list[tuple[Stream, float]] | None:
    """Token streams and their shares, or None when `source` is a list of prompts.

    Raises:
        ValueError: a corpus folder was encoded with another tokenizer than the target's.
    """
    if source.is_dir():
        check_same_tokenizer(source, target)
        return [
            (np.fromfile(source / f"{split}.{part}.bin", dtype=np.uint16).astype(np.int32), share)
            for part, share in CORPUS_SHARES.items()
        ]
    if source.suffix == ".json":
        return None
    ids = load_tokenizer(target).encode(source.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return [(np.array(ids, dtype=np.int32), 1.0)]


def check_same_tokenizer(corpus: Path, target: Path) -> None:
    """Raises ValueError where a corpus folder was encoded with another tokenizer than the target's."""
    if load_tokenizer(corpus).to_str() != load_tokenizer(target).to_str():
        raise ValueError(f"{corpus}: encoded with another tokenizer than that of {target}")


def load_tokenizer(target: Path) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(target / "tokenizer.json"))


def windows(streams: list[tuple[Stream, float]], num: int, length: int, seed: int) -> np.ndarray:
    """int32 ``[num, length]``: random windows, streams by their shares.

    Raises:
        ValueError: a stream is shorter than a window.
    """
    rng = np.random.default_rng((seed, length))
    out = np.empty((num, length), dtype=np.int32)
    for i, which in enumerate(rng.choice(len(streams), size=num, p=[share for _, share in streams])):
        stream = streams[which][0]
        if len(stream) <= length:
            raise ValueError(f"a text of {len(stream)} tokens is too short for windows of {length}")
        start = int(rng.integers(0, len(stream) - length))
        out[i] = stream[start : start + length]
    return out


class Sequences:
    """The rows that `regenerate` made; a view of the files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info: dict[str, Any] = json.loads((folder / "data.json").read_text())
        self.length = int(self.info["length"])
        shape = (int(self.info["num_regenerated"] + self.info["num_windows"]), self.length)
        #: int32 ``[N, length]``; regenerated rows first.
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r", shape=shape)
        #: First real token, first and last index at which a block may be anchored; int64 ``[N]`` each.
        self.starts, self.first, self.last = np.load(folder / "ranges.npy")

    @property
    def num_regenerated(self) -> int:
        """Rows that the target continued."""
        return int(self.info["num_regenerated"])

    def __len__(self) -> int:
        return len(self.tokens)


def regenerate(config: RegenerateConfig, *, device: str = "cpu") -> Sequences:
    """Continues the prompts, or goes on where an interrupted run stopped."""
    import time

    if (config.output_dir / "data.json").exists():
        return Sequences(config.output_dir)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    length = config.prompt_tokens + config.new_tokens
    streams = read_streams(config.source, config.target)
    if streams is None:
        prompts, starts = _padded_prompts(config)
    else:
        prompts = windows(streams, config.num_regenerated, config.prompt_tokens, config.seed)
        starts = np.zeros(len(prompts), dtype=np.int64)
    model = load_causal_lm(config.target, torch.bfloat16, device)
    if device == "cpu":
        use_fast_decoding(model)
    path = config.output_dir / "tokens.bin"
    have = path.stat().st_size // (4 * length) if path.exists() else 0
    have = min(have, len(prompts)) // config.batch_size * config.batch_size
    deadline = time.monotonic() + 60 * config.max_minutes
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(have * 4 * length)
        file.seek(have * 4 * length)
        for first in track(range(have, len(prompts), config.batch_size), description="regenerate"):
            if time.monotonic() > deadline:
                break
            rows = slice(first, first + config.batch_size)
            made = _continue(model, prompts[rows], starts[rows], config, first, device)
            file.write(made.astype(np.int32).tobytes())
            file.flush()
            have = first + len(made)
        if streams is not None:
            file.write(windows(streams, config.num_windows, length, config.seed + 1).tobytes())
    _write_ranges(config, path, starts[:have], model.config.eos_token_id)
    return Sequences(config.output_dir)


def _padded_prompts(config: RegenerateConfig) -> tuple[np.ndarray, np.ndarray]:
    entries = json.loads(config.source.read_text(encoding="utf-8"))
    texts = [e if isinstance(e, str) else e["text"] for e in entries]
    ids = [e.ids[-config.prompt_tokens :] for e in load_tokenizer(config.target).encode_batch(texts)]
    ids = [one for one in ids if one]
    if not ids:
        raise ValueError(f"{config.source} holds no prompt")
    chosen = [ids[i % len(ids)] for i in range(config.num_regenerated)]
    starts = np.array([config.prompt_tokens - len(one) for one in chosen], dtype=np.int64)
    return np.array([[0] * s + one for s, one in zip(starts, chosen, strict=True)], dtype=np.int32), starts


def _write_ranges(config: RegenerateConfig, path: Path, starts: np.ndarray, eos: Any) -> None:
    length = config.prompt_tokens + config.new_tokens
    tokens = np.fromfile(path, dtype=np.int32).reshape(-1, length)
    num = len(starts)
    num_windows = len(tokens) - num
    starts = np.concatenate((starts, np.zeros(num_windows, dtype=np.int64)))
    # A few anchors inside the prompt as well: the head also reads text that the target did not write.
    first = np.where(np.arange(len(tokens)) < num, config.prompt_tokens - 16, 32)
    first = np.maximum(np.clip(first, 0, length - 2), starts + 1)
    last = np.full(len(tokens), length - 2, dtype=np.int64)
    if config.source.suffix == ".json" and eos is not None:
        # What a chat model says behind its end is no use.
        ends = np.isin(tokens[:, config.prompt_tokens :], np.atleast_1d(eos))
        cut = np.where(ends.any(1), config.prompt_tokens + ends.argmax(1) - 1, last)
        last = np.maximum(np.minimum(last, cut), first)
    np.save(config.output_dir / "ranges.npy", np.stack((starts, first, last)).astype(np.int64))
    info = {"length": length, "prompt_tokens": config.prompt_tokens, "temperatures": list(config.temperatures)}
    info |= {"num_regenerated": num, "num_windows": num_windows}
    (config.output_dir / "data.json").write_text(json.dumps(info, indent=1))


def load_causal_lm(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The `transformers` model of a target, for inference."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def _attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """One query per row, ``[B, Hq, 1, D]`` over ``[B, Hkv, N, D]``, to ``[B, 1, Hq, D]``; sums in fp32."""
    grouped = q.view(q.shape[0], k.shape[1], -1, 1, q.shape[3]).float() * scale
    scores = (grouped * k[:, :, None].float()).sum(-1)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1)
    return (weights[..., None] * v[:, :, None].float()).sum(-2).to(q.dtype).view(q.shape[0], 1, q.shape[1], q.shape[3])


def use_fast_decoding(model: Any) -> None:
    """On CPU, `scaled_dot_product_attention` of single queries takes three times as long as its memory traffic."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    compiled = torch.compile(_attend_one, dynamic=True)

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if query.shape[2] > 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        bias = None
        if attention_mask is not None:
            seen = attention_mask if attention_mask.dtype is torch.bool else attention_mask >= 0
            bias = torch.zeros(seen.shape).masked_fill_(~seen, -1e9)
        return compiled(query, key, value, bias, scaling or query.shape[-1] ** -0.5), None

    ALL_ATTENTION_FUNCTIONS.register("jetflow_decode", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("jetflow_decode", sdpa_mask)
    model.set_attn_implementation("jetflow_decode")


def _growing_cache(num_layers: int, max_length: int) -> Any:
    """A `transformers` cache that writes into place instead of copying itself at every step."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        """Views of one buffer of `max_length` tokens."""

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            batch, heads, _, dim = key_states.shape
            self.buffers = key_states.new_empty(2, batch, heads, max_length, dim)

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Appends."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            begin = self.get_seq_length()
            end = begin + key_states.shape[2]
            self.buffers[0, :, :, begin:end] = key_states
            self.buffers[1, :, :, begin:end] = value_states
            self.keys, self.values = self.buffers[0, :, :, :end], self.buffers[1, :, :, :end]
            return self.keys, self.values

    cache = DynamicCache()
    cache.layers = [Layer() for _ in range(num_layers)]
    return cache


def _continue(
    model: Any, prompts: np.ndarray, starts: np.ndarray, config: RegenerateConfig, first: int, device: str
) -> np.ndarray:
    """Row i of the whole run has temperature i modulo their number."""
    generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + first)
    temperatures = torch.tensor(config.temperatures, device=device)
    factors = temperatures[torch.arange(first, first + len(prompts), device=device) % len(temperatures), None]

    def choose(logits: torch.Tensor, _: int) -> torch.Tensor:
        noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
        return (logits + noise * factors).argmax(-1)

    return continue_prompts(model, prompts, config.new_tokens, starts=starts, choose=choose, device=device)


@torch.inference_mode()
def continue_prompts(
    model: Any,
    prompts: np.ndarray,
    new_tokens: int,
    *,
    starts: np.ndarray | None = None,
    choose: Choose | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """Continues prompts of one length; nothing ends a row early.

    Args:
        model: a `transformers` causal language model.
        prompts: integers ``[R, prompt_tokens]``.
        new_tokens: tokens to add.
        starts: index of each row's first real token; None is 0 for all.
        choose: None is greedy.
        device: where the model is.

    Returns:
        int64 ``[R, prompt_tokens + new_tokens]``.
    """
    ids = torch.from_numpy(np.asarray(prompts, dtype=np.int64)).to(device)
    total = ids.shape[1] + new_tokens
    cache = _growing_cache(model.config.num_hidden_layers, total)
    padded = starts is not None and bool(starts.any())
    begin = torch.as_tensor(starts if padded else [0], device=device)[:, None]
    seen = (torch.arange(total, device=device) >= begin).long()
    out, step = [ids], ids
    for position in range(ids.shape[1], total):
        extra: dict[str, Any] = {}
        if padded:
            positions = torch.arange(position - step.shape[1], position, device=device)
            extra = {"attention_mask": seen[:, :position], "position_ids": (positions - begin).clamp(min=0)}
        logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra).logits[:, -1]
        step = (logits.float().argmax(-1) if choose is None else choose(logits.float(), position))[:, None]
        out.append(step)
    return torch.cat(out, 1).cpu().numpy()
