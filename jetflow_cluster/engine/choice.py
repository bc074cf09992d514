"""The target's own token at the nodes that the walk reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jetflow_cluster.engine.protocols import ScheduledRequest
from jetflow_cluster.engine.request import Request
from jetflow_cluster.layers.sampler import SamplingRow, choose_tokens, is_plain_greedy
from jetflow_cluster.tree.accept import AcceptedPath, accept_trees
from jetflow_cluster.tree.draft_tree import DraftTree


def accept_on_host(
    items: Sequence[ScheduledRequest], first_rows: Sequence[int], trees: Sequence[DraftTree], logits: torch.Tensor
) -> list[AcceptedPath]:
    """The accepted path of each item.

    Args:
        items: those that choose a token in this step.
        first_rows: row of `logits` of each item's root; node i has the i-th row from there.
        trees: of each item.
        logits: ``[M, vocab_size]``.
    """
    return accept_trees(trees, TargetChoice(items, first_rows, logits))


class TargetChoice:
    """Chooses tokens for `accept_trees` from one verify pass.

    Args:
        items: the items that choose a token in this step, in the order of the trees given to `accept_trees`.
        first_rows: row of `logits` of each item's root.
        logits: ``[M, vocab_size]``.
    """

    def __init__(self, items: Sequence[ScheduledRequest], first_rows: Sequence[int], logits: torch.Tensor):
        self._requests = [item.request for item in items]
        self._first_rows = first_rows
        self._logits = logits
        self._plain = [is_plain_greedy(item.request.params) for item in items]
        self._best: list[int] = _best_tokens(logits) if any(self._plain) else []

    def __call__(self, walking: list[tuple[int, int, list[int]]]) -> list[int]:
        """The target's token behind each ``(item, node, accepted token ids so far)``."""
        tokens = [0] * len(walking)
        processed: list[int] = []
        for i, (item, node, path) in enumerate(walking):
            if self._plain[item] and not self._is_below_minimum(self._requests[item], path):
                tokens[i] = self._best[self._first_rows[item] + node]
            else:
                processed.append(i)
        if processed:
            rows = [self._first_rows[walking[i][0]] + walking[i][1] for i in processed]
            sampling = [self._row(self._requests[walking[i][0]], walking[i][2]) for i in processed]
            for i, token in zip(processed, choose_tokens(self._logits[rows], sampling), strict=True):
                tokens[i] = token
        return tokens

    @staticmethod
    def _is_below_minimum(request: Request, path: list[int]) -> bool:
        return request.num_output + len(path) < request.params.min_tokens

    def _row(self, request: Request, path: list[int]) -> SamplingRow:
        return SamplingRow(
            params=request.params,
            seed=request.seed,
            position=len(request.token_ids) + len(path),
            counts=request.counted_tokens(),
            path=path,
            suppressed_ids=request.suppressed_ids if self._is_below_minimum(request, path) else (),
        )


def _best_tokens(logits: torch.Tensor) -> list[int]:
    """Best token of each row, the first of equals; NumPy's search is six times as fast as torch's on a CPU."""
    if not logits.is_cpu:
        return list(logits.argmax(-1).tolist())
    rows = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return list(rows.numpy().argmax(-1).tolist())
