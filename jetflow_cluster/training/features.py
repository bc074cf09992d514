"""What the target says about training sequences, computed once and kept on disk.

With the forward KL at temperature T, the teacher enters the gradient through ``sum_v p_v W_v`` alone, the mean row of
the output layer W under the teacher's distribution p: ``KL = const - <mean row, h> / T + logsumexp(W h / T)`` for a
student with hidden state h. One vector of the hidden size per token replaces a row of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from jetflow_cluster.training.regenerate import Sequences, load_causal_lm

_ROWS = 16


class Features:
    """Per-token features of `Sequences`, bf16 on disk; made when first asked for.

    ``tap{t}.bin`` is the output of target layer t, ``final.bin`` the final-normed hidden state, ``mean{T}.bin`` the
    mean output row at temperature T, each ``[N, length, hidden]``; ``label.bin`` is the target's own greedy next
    token and ``entropy{T}.bin`` the teacher's entropy in nats, each ``[N, length]``.
    """

    def __init__(self, sequences: Sequences, target: Path, taps: tuple[int, ...], temperature: float = 1.0):
        self.sequences = sequences
        self._names = [f"tap{t}" for t in taps] + ["final", f"mean{temperature:g}"]
        self._entropy_name = f"entropy{temperature:g}"
        self._folder = sequences.folder
        missing = [n for n in (*self._names, self._entropy_name, "label") if not (self._folder / f"{n}.bin").exists()]
        if missing:
            _compute(sequences, target, missing, taps, temperature)
        shape = sequences.tokens.shape
        hidden = (self._folder / "final.bin").stat().st_size // (2 * shape[0] * shape[1])
        self._wide = {n: np.memmap(self._path(n), np.int16, "r", shape=(*shape, hidden)) for n in self._names}
        self._labels = np.memmap(self._path("label"), np.int32, "r", shape=shape)
        self._entropy = np.memmap(self._path(self._entropy_name), np.float32, "r", shape=shape)
        self._taps = [f"tap{t}" for t in taps]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.bin"

    def _read(self, name: str, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._wide[name][rows])).view(torch.bfloat16)

    def taps(self, rows: np.ndarray) -> torch.Tensor:
        """bf16 ``[len(rows), length, num_taps * hidden]``."""
        return torch.cat([self._read(name, rows) for name in self._taps], -1)

    def final(self, rows: np.ndarray) -> torch.Tensor:
        """bf16 ``[len(rows), length, hidden]``."""
        return self._read("final", rows)

    def mean_rows(self, rows: np.ndarray) -> torch.Tensor:
        """bf16 ``[len(rows), length, hidden]``; at index i the teacher of token i + 1."""
        return self._read(self._names[-1], rows)

    def labels(self, rows: np.ndarray) -> torch.Tensor:
        """int64 ``[len(rows), length]``: the target's greedy choice of token i + 1."""
        return torch.from_numpy(self._labels[rows].astype(np.int64))

    def entropy(self, rows: np.ndarray) -> torch.Tensor:
        """fp32 ``[len(rows), length]``."""
        return torch.from_numpy(np.ascontiguousarray(self._entropy[rows]))


def _compute(sequences: Sequences, target: Path, names: list[str], taps: tuple[int, ...], temperature: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(target, torch.bfloat16, device)
    compiled = torch.compile(_observe, dynamic=False)
    files = {n: (sequences.folder / f"{n}.new").open("wb") for n in names}
    starts = torch.from_numpy(sequences.starts)
    padded = bool(starts.any())
    index = torch.arange(sequences.length)
    for first in track(range(0, len(sequences), _ROWS), description="target features"):
        rows = np.arange(first, first + _ROWS) % len(sequences)
        ids = torch.from_numpy(sequences.tokens[rows].astype(np.int64)).to(device)
        mask = (index >= starts[rows, None]).long().to(device) if padded else None
        with torch.inference_mode():
            seen = compiled(model, ids, mask, taps, temperature)
        seen = {name.format(T=f"{temperature:g}"): value for name, value in seen.items()}
        keep = min(_ROWS, len(sequences) - first)
        for name, file in files.items():
            file.write(_bytes(seen[name][:keep]))
    for name, file in files.items():
        file.close()
        (sequences.folder / f"{name}.new").rename(sequences.folder / f"{name}.bin")


def _bytes(values: torch.Tensor) -> bytes:
    values = values.cpu().contiguous()
    if values.dtype is torch.bfloat16:
        return values.view(torch.int16).numpy().tobytes()
    return values.numpy().tobytes()


def _observe(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, taps: tuple[int, ...], temperature: float
) -> dict[str, torch.Tensor]:
    out = model.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    final, head = out.last_hidden_state, model.lm_head.weight
    logits = (final @ head.T).float()
    logprobs = (logits / temperature).log_softmax(-1)
    probs = logprobs.exp()
    seen = {f"tap{t}": out.hidden_states[t + 1] for t in taps}
    return seen | {
        "final": final,
        "mean{T}": probs.to(head.dtype) @ head,
        "entropy{T}": -(probs * logprobs).sum(-1),
        "label": logits.argmax(-1).int(),
    }
