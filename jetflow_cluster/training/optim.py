"""Optimizers and schedules that the target's and the head's training share."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(kw_only=True)
class Progress:
    """How far a run is, measured by tokens or by minutes, whichever ends first.

    Time that an interrupted run already spent counts when it is resumed.
    """

    max_tokens: int
    max_minutes: float
    tokens: int = 0
    spent_s: float = 0.0
    _since: float = field(default_factory=time.monotonic, repr=False)

    def seconds(self) -> float:
        """Training seconds so far, interrupted runs included."""
        return self.spent_s + time.monotonic() - self._since

    def fraction(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return min(1.0, max(self.tokens / self.max_tokens, self.seconds() / (60 * self.max_minutes)))


def lr_factor(fraction: float, *, warmup: float, decay_from: float | None) -> float:
    """Multiplier of the peak learning rate.

    Args:
        fraction: share of the run that is done.
        warmup: share of linear warm-up.
        decay_from: where linear decay to zero starts; None is cosine from the end of the warm-up.
    """
    if fraction < warmup:
        return max(fraction / warmup, 0.02)
    if decay_from is None:
        position = torch.tensor((fraction - warmup) / (1 - warmup) * torch.pi)
        return float(0.5 * (1 + torch.cos(position)).clamp(min=0.0))
    return min(1.0, max(0.0, (1 - fraction) / (1 - decay_from)))


class Optimizer:
    """Muon for matrices and AdamW for the rest, or AdamW for all, behind one step."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        kind: str,
        matrix_lr: float,
        other_lr: float,
        weight_decay: float = 0.0,
        not_matrices: tuple[str, ...] = ("embed_tokens",),
    ):
        if kind not in ("muon", "adamw"):
            raise ValueError(f"optimizer must be 'muon' or 'adamw', not {kind!r}")
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named:
            is_matrix = parameter.ndim == 2 and not any(n in name for n in not_matrices)
            (matrices if is_matrix else others).append(parameter)
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []
        if kind == "muon":
            muon = torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=weight_decay)
            self._parts.append((muon, matrix_lr))
        else:
            others = matrices + others
        if others:
            adamw = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0)
            self._parts.append((adamw, other_lr))

    def step(self, factor: float) -> None:
        """One update at ``factor`` times the peak rates; gradients are cleared."""
        for optimizer, peak in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        """State of every part, in order."""
        return [optimizer.state_dict() for optimizer, _ in self._parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Restores what `state_dict` gave."""
        for (optimizer, _), state in zip(self._parts, states, strict=True):
            optimizer.load_state_dict(state)
