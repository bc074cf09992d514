"""The loss of a draft head: forward KL against the target, over all depths of a block."""

from __future__ import annotations

from typing import Any

import torch


class _SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy of soft labels, given as their mean output row; the gradient is made on the way forward, so no
    vocabulary-sized tensor outlives the call.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, mean_rows: torch.Tensor) -> tuple[Any, Any]:
        logits = hidden.to(head.dtype) @ head.T
        wide = logits.float()
        total = wide.logsumexp(-1)
        probs = (wide - total[:, None]).exp().to(head.dtype)
        target = mean_rows.float()
        ctx.save_for_backward((probs @ head).float() - target)
        best = logits.argmax(-1)
        ctx.mark_non_differentiable(best)
        return total - (hidden.float() * target).sum(-1), best

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, None, None]:
        (direction,) = ctx.saved_tensors
        return direction * grad[:, None], None, None


def soft_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, mean_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-sum_v p_v log q_v`` with ``q = softmax(head @ hidden)``, p given as ``sum_v p_v head_v``.

    Args:
        hidden: student states ``[N, H]``, the only input with a gradient.
        head: output layer ``[V, H]``.
        mean_rows: ``[N, H]``.

    Returns:
        fp32 losses ``[N]``, and the student's greedy choices, int64 ``[N]``.
    """
    return _SoftCrossEntropy.apply(hidden, head, mean_rows)


def depth_weights(num_depths: int, gamma: float | None) -> torch.Tensor:
    """fp32 ``[num_depths]``: ``exp(-k / gamma)`` for k = 1, 2, ..., or ones."""
    depths = torch.arange(1, num_depths + 1, dtype=torch.float32)
    return torch.ones(num_depths) if gamma is None else torch.exp(-depths / gamma)


def accept_until_fail(best: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Support of the accept-until-fail loss (arXiv 2607.01893): each block's depths up to and including the first
    at which the head's greedy choice is not the label; behind it verification would have stopped.

    Args:
        best: the head's choices, ``[..., D]``.
        labels: tokens that were right, ``[..., D]``.

    Returns:
        fp32 ``[..., D]`` of ones and zeros, without gradient.
    """
    right = (best == labels).float()
    before = torch.cat((torch.ones_like(right[..., :1]), right[..., :-1]), -1)
    return before.cumprod(-1).detach()
