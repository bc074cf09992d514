"""The production path on CPU: few batched calls, no loop over requests or heads.

Requests with a similar number of rows form a group; a group is one `scaled_dot_product_attention` over keys padded to
its longest request. Grouped-query heads become more query rows, so K and V are never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from jetflow_kernels.tree_attention.plan import TreeAttentionPlan

#: Requests whose row counts lie within this factor share a group.
_GROUP_FACTOR = 4
#: Below this many rows a half-precision product falls to a slow path on CPU; fp32 is three times as fast there.
_FEW_ROWS = 4
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(kw_only=True)
class _Group:
    """Requests that are computed together."""

    #: Rows of the batch, ``[G * N]``, padded with a row of the same request; None: all rows, in order.
    gather: torch.Tensor | None
    #: Positions in the padded rows that are real, in the order of `rows`; None: all.
    real: torch.Tensor | None
    rows: torch.Tensor | None
    num_requests: int
    num_rows: int
    #: First slot when one run of slots holds all keys, else None.
    first_slot: int | None
    #: int64 ``[G * L]``, where `first_slot` is None.
    key_slots: torch.Tensor | None
    num_keys: int
    #: bool ``[G, 1, N, L]``; None: every key is visible.
    mask: torch.Tensor | None
    bias: dict[tuple[torch.dtype, int], torch.Tensor]


def tree_attention_cpu(
    plan: TreeAttentionPlan, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """See `jetflow_kernels.tree_attention.tree_attention`."""
    groups = plan.derived.get("cpu")
    if groups is None:
        groups = plan.derived["cpu"] = _make_groups(plan, q.device)
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads = k_pages.shape[2]
    k_slots, v_slots = k_pages.view(-1, num_kv_heads, head_dim), v_pages.view(-1, num_kv_heads, head_dim)
    out = None
    for group in groups:  # type: ignore[attr-defined]
        part = _attend(group, q, k_slots, v_slots, num_heads // num_kv_heads, scale)
        if group.rows is None:
            return part
        if out is None:
            out = torch.empty_like(q)
        out[group.rows] = part if group.real is None else part[group.real]
    assert out is not None
    return out


def _attend(
    group: _Group, q: torch.Tensor, k_slots: torch.Tensor, v_slots: torch.Tensor, per_kv_head: int, scale: float
) -> torch.Tensor:
    count, rows, keys = group.num_requests, group.num_rows, group.num_keys
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads = num_heads // per_kv_head
    if group.gather is not None:
        q = q[group.gather]
    if group.first_slot is not None:
        k, v = k_slots.narrow(0, group.first_slot, keys), v_slots.narrow(0, group.first_slot, keys)
    else:
        assert group.key_slots is not None
        k, v = k_slots.index_select(0, group.key_slots), v_slots.index_select(0, group.key_slots)
    k = k.view(count, keys, num_kv_heads, head_dim).transpose(1, 2)
    v = v.view(count, keys, num_kv_heads, head_dim).transpose(1, 2)
    if per_kv_head == 1:
        folded = q.view(count, rows, num_heads, head_dim).transpose(1, 2)
    else:
        folded = q.view(count, rows, num_kv_heads, per_kv_head, head_dim).permute(0, 2, 3, 1, 4)
        folded = folded.reshape(count, num_kv_heads, per_kv_head * rows, head_dim)
    if count > 1 and folded.shape[2] < _FEW_ROWS and q.dtype in _HALVES:
        folded, k, v = folded.float(), k.float(), v.float()
    bias = _bias(group, folded.dtype, per_kv_head)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias, scale=scale).to(q.dtype)
    if per_kv_head > 1:
        out = out.view(count, num_kv_heads, per_kv_head, rows, head_dim).permute(0, 3, 1, 2, 4)
    else:
        out = out.transpose(1, 2)
    return out.reshape(count * rows, num_heads, head_dim)


def _bias(group: _Group, dtype: torch.dtype, per_kv_head: int) -> torch.Tensor | None:
    """Additive mask ``[G, 1, per_kv_head * N, L]``."""
    if group.mask is None:
        return None
    key = (dtype, per_kv_head)
    if key not in group.bias:
        bias = torch.zeros(group.mask.shape, dtype=dtype, device=group.mask.device)
        bias.masked_fill_(~group.mask, float("-inf"))
        group.bias[key] = bias.repeat(1, 1, per_kv_head, 1) if per_kv_head > 1 else bias
    return group.bias[key]


def _make_groups(plan: TreeAttentionPlan, device: torch.device) -> list[_Group]:
    order = sorted(range(len(plan.query_lens)), key=lambda r: plan.query_lens[r])
    groups: list[list[int]] = []
    for request in order:
        if groups and plan.query_lens[request] <= _GROUP_FACTOR * plan.query_lens[groups[-1][0]]:
            groups[-1].append(request)
        else:
            groups.append([request])
    starts = [0]
    for count in plan.query_lens:
        starts.append(starts[-1] + count)
    return [_make_group(plan, sorted(members), starts, device, len(groups) == 1) for members in groups]


def _make_group(
    plan: TreeAttentionPlan, members: list[int], starts: list[int], device: torch.device, is_only: bool
) -> _Group:
    query_lens = [plan.query_lens[r] for r in members]
    key_lens = [plan.query_lens[r] + plan.context_lens[r] for r in members]
    num_rows, num_keys = max(query_lens), max(key_lens)
    is_even = min(query_lens) == num_rows
    gather = real = rows = None
    if not (is_only and is_even):
        padded = [starts[r] + min(i, n - 1) for r, n in zip(members, query_lens, strict=True) for i in range(num_rows)]
        gather = torch.tensor(padded, device=device)
        kept = [g * num_rows + i for g, n in enumerate(query_lens) for i in range(n)]
        rows = torch.tensor([padded[i] for i in kept], device=device)
        real = None if is_even else torch.tensor(kept, device=device)
    first_slot, key_slots = _key_slots(plan, members, key_lens, num_keys)
    return _Group(
        gather=gather,
        real=real,
        rows=rows,
        num_requests=len(members),
        num_rows=num_rows,
        first_slot=first_slot,
        key_slots=key_slots,
        num_keys=num_keys,
        mask=_mask(plan, members, starts, num_rows, num_keys, device),
        bias={},
    )


def _key_slots(
    plan: TreeAttentionPlan, members: list[int], key_lens: list[int], num_keys: int
) -> tuple[int | None, torch.Tensor | None]:
    """A run of slots, or the slot of each padded key; padding repeats a key of the same request, never garbage."""
    page_size = plan.page_size
    num_pages = -(-num_keys // page_size)
    table = plan.page_table[:, :num_pages] if len(members) == plan.page_table.shape[0] else None
    if table is None:
        table = plan.page_table[torch.tensor(members, device=plan.page_table.device), :num_pages]
    if len(members) == 1:
        pages = table[0].tolist()
        if pages == list(range(pages[0], pages[0] + num_pages)):
            return pages[0] * page_size, None
    device = table.device
    index = torch.arange(num_keys, device=device)[None].minimum(torch.tensor(key_lens, device=device)[:, None] - 1)
    slots = table.long().gather(1, index // page_size) * page_size + index % page_size
    return None, slots.flatten()


def _mask(
    plan: TreeAttentionPlan, members: list[int], starts: list[int], num_rows: int, num_keys: int, device: torch.device
) -> torch.Tensor | None:
    """bool ``[G, 1, N, L]``, or None where every row sees every key."""
    query_lens = [plan.query_lens[r] for r in members]
    context_lens = [plan.context_lens[r] for r in members]
    is_level = len({q + c for q, c in zip(query_lens, context_lens, strict=True)}) == 1
    if is_level and (num_rows == 1 or (plan.bidirectional and min(query_lens) == num_rows)):
        return None
    context = torch.tensor(context_lens, device=device)[:, None, None]
    length = torch.tensor(query_lens, device=device)[:, None, None]
    row = torch.arange(num_rows, device=device)[None, :, None]
    own = torch.arange(num_keys, device=device)[None, None, :] - context
    if plan.bidirectional:
        mask = (own < length).expand(-1, num_rows, -1)
    else:
        # A padded row repeats the last real one.
        mask = own <= row.minimum(length - 1)
        trees = [g for g, r in enumerate(members) if not plan.is_chain[r]]
        if trees:
            mask = mask.clone()
            ancestors = _ancestors(plan, [members[g] for g in trees], starts, num_rows, device)
            where = own[trees].clamp(0, num_rows - 1).expand(-1, num_rows, -1)
            mask[trees] &= (own[trees] < 0) | ancestors.gather(2, where)
    return mask[:, None]


def _ancestors(
    plan: TreeAttentionPlan, members: list[int], starts: list[int], num_rows: int, device: torch.device
) -> torch.Tensor:
    """bool ``[G, N, N]``: column is row itself or one of its ancestors."""
    num_bytes = -(-num_rows // 8)
    parents = plan.parents.tolist()
    packed = bytearray()
    for r in members:
        bits: list[int] = []
        for i, parent in enumerate(parents[starts[r] : starts[r + 1]]):
            bits.append((bits[parent] if parent >= 0 else 0) | 1 << i)
        # Padded rows see what the last real one sees.
        bits += bits[-1:] * (num_rows - len(bits))
        packed += b"".join(row.to_bytes(num_bytes, "little") for row in bits)
    words = torch.frombuffer(packed, dtype=torch.uint8).view(len(members), num_rows, num_bytes, 1).to(device)
    masks = (words >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return masks.flatten(2)[..., :num_rows].bool()
