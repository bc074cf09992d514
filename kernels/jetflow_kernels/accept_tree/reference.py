"""The definition, one node at a time."""

from __future__ import annotations

import torch

from jetflow_kernels.accept_tree.buffers import SamplingTable, VerifiedTrees, WalkBuffers
from jetflow_kernels.philox_gumbel.reference import philox_gumbel_reference


def accept_tree_reference(trees: VerifiedTrees, table: SamplingTable | None, out: WalkBuffers) -> None:
    """See `jetflow_kernels.accept_tree.accept_tree`."""
    for r, count in enumerate(trees.counts.tolist()):
        nodes = [0] * bool(count)
        path: list[int] = []
        while len(path) < len(nodes):
            logits = trees.logits[int(trees.first_rows[r]) + nodes[-1]].double()
            logits = torch.where(logits.isnan(), float("inf"), logits)
            token = int((logits if table is None else _scores(logits, table, r, path)).argmax())
            path.append(token)
            for i in range(1, count):
                if trees.parents[r, i] == nodes[-1] and trees.token_ids[r, i] == token:
                    nodes.append(i)
                    break
        out.nodes[r, : len(nodes)] = torch.tensor(nodes, dtype=torch.int32)
        out.token_ids[r, : len(path)] = torch.tensor(path, dtype=torch.int32)
        out.lengths[r] = len(nodes)
    out.walking.zero_()


def _scores(logits: torch.Tensor, table: SamplingTable, r: int, path: list[int]) -> torch.Tensor:
    """float64 ``[V]``: what the token behind a path is the argmax of."""
    seed, position, top_k, num_barred, num_changed = table.numbers[r].tolist()
    temperature, top_p, log_min_p, repetition, presence, frequency = table.factors[r].tolist()
    scores = logits.clone()
    counts = dict.fromkeys(path, 0)
    changed_ids, changed_counts = table.changed_ids[r, :num_changed], table.changed_counts[r, :num_changed]
    for token, count in zip(changed_ids.tolist(), changed_counts.tolist(), strict=True):
        if count >= 0:
            counts[token] = count
    for token, count in counts.items():
        value, count = scores[token].item(), count + path.count(token)
        value = value / repetition if value > 0 else value * repetition
        scores[token] = value - (presence * (count > 0) + frequency * count)
    scores[changed_ids.long()] += table.changed_bias[r, :num_changed]
    if len(path) < num_barred:
        barred = table.barred_ids[r]
        scores[barred[(barred >= 0) & (barred < len(scores))].long()] = float("-inf")
    if temperature == 0:
        return scores
    scores = scores / temperature
    best = scores.sort(descending=True, stable=True)
    num_kept = top_k if 0 < top_k < len(scores) else len(scores)
    if top_p < 1:
        mass = (best.values[:num_kept] - best.values[0]).exp().cumsum(0)
        num_kept = 1 + int((mass[:-1] < top_p * mass[-1]).sum())
    scores[best.indices[num_kept:]] = float("-inf")
    scores[scores < best.values[0] + log_min_p] = float("-inf")
    key, at = torch.tensor((seed, position + len(path)), device=scores.device).unbind()
    return scores + philox_gumbel_reference(key, at, torch.arange(len(scores), device=scores.device))


def commit_slots_reference(
    out: WalkBuffers,
    source_slots: torch.Tensor,
    target_slots: torch.Tensor,
    *,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
) -> None:
    """See `jetflow_kernels.accept_tree.commit_slots`."""
    source_slots.fill_(-1)
    target_slots.fill_(-1)
    for r, length in enumerate(out.lengths.tolist()):
        for i, node in enumerate(out.nodes[r, :length].tolist()):
            if node == i:
                continue
            for slots, place in ((source_slots, node), (target_slots, i)):
                index = int(context_lens[r]) + place
                slots[r, i] = int(page_table[r, index // page_size]) * page_size + index % page_size
