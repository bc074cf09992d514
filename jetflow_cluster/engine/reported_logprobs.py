"""Log-probabilities that requests ask for, from a step's logits."""

from __future__ import annotations

import torch

from jetflow_cluster.engine.batch import StepBatch, wants_prompt_logprobs
from jetflow_cluster.engine.protocols import ScheduledRequest
from jetflow_cluster.layers.sampler import token_logprobs
from jetflow_cluster.tree.accept import AcceptedPath


def report_logprobs(
    index: int, item: ScheduledRequest, batch: StepBatch, logits: torch.Tensor | None, path: AcceptedPath | None
) -> None:
    """Appends to a request what it asked for of the prompt's tokens and of the accepted ones.

    Args:
        index: of the item in the plan.
        item: computed, and not committed yet.
        batch: its rows and those of the others.
        logits: ``[len(batch.logits_rows), vocab_size]``; None where no row needed any.
        path: accepted; None where no token was chosen.
    """
    request, first = item.request, batch.logits_starts[index]
    if logits is None:
        return
    if wants_prompt_logprobs(item):
        # Behind a preemption rows are computed again; what was reported stays.
        offset = len(request.prompt_logprobs) - request.num_computed - 1
        start, stop = request.num_computed + 1 + offset, request.num_computed + 1 + item.num_rows
        stop = min(stop, len(request.prompt_token_ids))
        if offset >= 0 and start < stop:
            rows = logits[first + offset : first + offset + stop - start]
            top = request.params.prompt_logprobs or 0
            request.prompt_logprobs += token_logprobs(rows, request.prompt_token_ids[start:stop], top)
    if path is not None and request.params.logprobs is not None:
        last = (batch.logits_starts[index + 1 :] or [len(batch.logits_rows)])[0] - 1
        rows_of = [first + node for node in path.nodes] if item.num_rows == 1 else [last]
        request.logprobs += token_logprobs(logits[rows_of], path.token_ids, request.params.logprobs)
