"""The call of `candidates.c`; returns None for what it does not serve, which is plain torch's."""

from __future__ import annotations

import torch

from jetflow_kernels.cpu.library import HALF, cpu_kernels, is_plain

#: Logits from which on rows are split among torch's threads.
_LARGE = 1 << 14


def draft_candidates(
    logits: torch.Tensor, *, width: int, sharpness: float, factors: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The tables of greedy requests; see `jetflow_cluster.tree.coupled.candidate_tables`.

    Args:
        logits: ``[R, D, V]``, contiguous along V.
        width: candidates per depth, at most V.
        sharpness: factor of depths 2 and deeper, above 0.
        factors: of the pairwise correction, ``[V, rank]`` of the parent and of the child.

    Returns:
        ids int64 ``[R, D, W]`` and fixed-point scores int32 ``[R, D, W, W]``, or ``[R, D, 1, W]`` without factors.
    """
    half = HALF.get(logits.dtype)
    if half is None or not is_plain(logits) or logits.stride(2) != 1 or not sharpness > 0.0:
        return None
    num_requests, num_depths, vocab_size = logits.shape
    functions = cpu_kernels().functions
    if functions is None or (factors is not None and not _factors_fit(*factors, vocab_size)):
        return None
    ids = torch.empty((num_requests, num_depths, width), dtype=torch.int64)
    logprobs = torch.empty((num_requests, num_depths, width), dtype=torch.float32)
    num_parents = 1 if factors is None else width
    scores = torch.empty((num_requests, num_depths, num_parents, width), dtype=torch.int32)
    is_large = logits.numel() >= _LARGE
    parent, child = (None, None) if factors is None else factors
    failed = (functions.released if is_large else functions.held).draft_candidates(
        logits.data_ptr(),
        logits.stride(0),
        logits.stride(1),
        half,
        num_requests,
        num_depths,
        vocab_size,
        width,
        sharpness,
        None if parent is None else parent.data_ptr(),
        None if child is None else child.data_ptr(),
        0 if parent is None else parent.shape[1],
        0 if parent is None else HALF[parent.dtype],
        ids.data_ptr(),
        logprobs.data_ptr(),
        scores.data_ptr(),
        torch.get_num_threads() if is_large else 1,
    )
    return None if failed else (ids, scores)


def _factors_fit(parent: torch.Tensor, child: torch.Tensor, vocab_size: int) -> bool:
    """True where they lie as `candidates.c` reads them."""
    return (
        parent.dtype in HALF
        and child.dtype is parent.dtype
        and parent.shape == child.shape
        and parent.shape[0] == vocab_size
        and all(one.is_cpu and one.is_contiguous() for one in (parent, child))
    )
