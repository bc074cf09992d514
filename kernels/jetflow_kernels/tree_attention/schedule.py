"""Divides a batch into few attention calls, once per plan: which rows, which keys, which mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from jetflow_kernels.tree_attention.plan import TreeAttentionPlan

#: From this many bytes of K on, reading a view of consecutive pages beats gathering in company.
_VIEW_BYTES = 256 * 1024
#: Most bytes of K, per thread, that one call gathers: what stays in a core's cache until it is read.
GATHER_BYTES = 2 * 1024 * 1024
#: Requests share a call while their keys, padded to the longest, are at most this factor and this many more.
_KEY_FACTOR, _KEY_MARGIN = 1.5, 32
#: What one more call costs, in products of a query's and a key's element: requests of other sizes are padded into a
#: call where that computes fewer for nothing.
CALL_PRODUCTS = 2 * 1024 * 1024
#: Most rows of one request in one call: a chunk's first rows need not look at its last keys.
_BLOCK_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the mask and the cost of a call depend on beside the plan."""

    #: In which attention is computed.
    dtype: torch.dtype
    device: torch.device
    num_kv_heads: int
    #: Query heads that share a KV head.
    rows_per_query: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One attention call: N rows of each request of a group, over the first `num_keys` keys."""

    #: First row of the batch where the rows are consecutive; None: see `rows`, or all rows where that is None too.
    first_row: int | None
    #: int64 ``[G * N]``; rows that a request lacks repeat its last one.
    rows: torch.Tensor | None
    num_rows: int
    num_keys: int
    #: Additive, ``[G, 1, N * rows_per_query, num_keys]``, or 1 in place of a size that does not matter; None: no mask.
    bias: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Requests whose keys are fetched together, padded to the longest."""

    num_requests: int
    num_keys: int
    #: Where the keys begin if they are one run of slots.
    first_slot: int
    #: int64 ``[G * num_keys]``, else; padding repeats the request's last key, so that no foreign slot is read.
    key_slots: torch.Tensor | None
    blocks: list[Block]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """All calls of a batch."""

    layout: Layout
    groups: list[Group]
    #: int64 ``[T]``: where each row of the batch is in the concatenated outputs; None: in order.
    order: torch.Tensor | None


def make_schedule(plan: TreeAttentionPlan, layout: Layout) -> Schedule:
    """Groups requests of similar size. Reads `plan.page_table` on the host."""
    first_slots = _first_slots(plan)
    groups: list[Group] = []
    order = [0] * plan.num_rows
    position = 0
    for members in _partition(plan, layout, first_slots):
        group = _make_group(plan, layout, members, first_slots)
        groups.append(group)
        position = _note_order(plan, members, group, order, position)
    is_in_order = position == plan.num_rows and order == list(range(position))
    return Schedule(
        layout=layout, groups=groups, order=None if is_in_order else torch.tensor(order, device=layout.device)
    )


def _first_slots(plan: TreeAttentionPlan) -> list[int | None]:
    """Of each request, the first slot if all its keys are one run of slots."""
    firsts: list[int | None] = []
    for pages, rows, context in zip(plan.page_table.tolist(), plan.query_lens, plan.context_lens, strict=True):
        count = -(-(rows + context) // plan.page_size)
        is_run = pages[:count] == list(range(pages[0], pages[0] + count))
        firsts.append(pages[0] * plan.page_size if is_run else None)
    return firsts


def _partition(plan: TreeAttentionPlan, layout: Layout, first_slots: list[int | None]) -> list[list[int]]:
    """Requests of one call each. Consecutive pages with much in them stand alone and are read in place."""
    if plan.num_requests == 1:
        return [[0]]
    key_lens = [q + c for q, c in zip(plan.query_lens, plan.context_lens, strict=True)]
    key_bytes = layout.num_kv_heads * layout.head_dim * layout.dtype.itemsize
    num_threads = torch.get_num_threads()
    # A call for one request keeps no more threads busy than it has heads.
    may_stand_alone = layout.num_kv_heads >= num_threads
    parts: list[list[int]] = []
    others = []
    for request, num_keys in enumerate(key_lens):
        if may_stand_alone and first_slots[request] is not None and num_keys * key_bytes >= _VIEW_BYTES:
            parts.append([request])
        else:
            others.append(request)
    sizes = [(plan.query_lens[r] - 1).bit_length() for r in range(plan.num_requests)]
    others.sort(key=lambda r: (sizes[r], key_lens[r]))
    call_pairs = CALL_PRODUCTS // (layout.num_kv_heads * layout.rows_per_query * layout.head_dim)
    last: list[int] = []
    num_rows = num_keys = 0
    for request in others:
        rows, keys = plan.query_lens[request], key_lens[request]
        most_rows, most_keys = max(rows, num_rows), max(keys, num_keys)
        is_alike = (
            bool(last)
            and sizes[request] == sizes[last[0]]
            and most_keys <= _KEY_FACTOR * key_lens[last[0]] + _KEY_MARGIN
        )
        joined = (len(last) + 1) * most_rows * most_keys
        is_cheap = bool(last) and joined <= len(last) * num_rows * num_keys + rows * keys + call_pairs
        if (is_alike or is_cheap) and (len(last) + 1) * most_keys * key_bytes <= GATHER_BYTES * num_threads:
            num_rows, num_keys = most_rows, most_keys
        else:
            last = []
            parts.append(last)
            num_rows, num_keys = rows, keys
        last.append(request)
    return [sorted(members) for members in parts]


def _make_group(plan: TreeAttentionPlan, layout: Layout, members: list[int], first_slots: list[int | None]) -> Group:
    query_lens = [plan.query_lens[r] for r in members]
    key_lens = [plan.query_lens[r] + plan.context_lens[r] for r in members]
    num_rows, num_keys = max(query_lens), max(key_lens)
    first_slot = first_slots[members[0]] if len(members) == 1 else None
    step = num_rows if plan.bidirectional else _BLOCK_ROWS
    blocks = [
        _make_block(plan, layout, members, start, min(start + step, num_rows)) for start in range(0, num_rows, step)
    ]
    return Group(
        num_requests=len(members),
        num_keys=num_keys,
        first_slot=first_slot or 0,
        key_slots=_key_slots(plan, members, key_lens, layout.device) if first_slot is None else None,
        blocks=blocks,
    )


def _key_slots(plan: TreeAttentionPlan, members: list[int], key_lens: list[int], device: torch.device) -> torch.Tensor:
    num_keys, page_size = max(key_lens), plan.page_size
    pages = plan.page_table[:, : -(-num_keys // page_size)].to(device, torch.int64)
    if len(members) < plan.num_requests:
        pages = pages[torch.tensor(members, device=device)]
    slots = (pages[:, :, None] * page_size + torch.arange(page_size, device=device)).flatten(1)[:, :num_keys]
    if min(key_lens) < num_keys:
        last = torch.tensor(key_lens, device=device)[:, None] - 1
        slots = slots.gather(1, torch.arange(num_keys, device=device)[None].minimum(last))
    return slots.flatten()


def _make_block(plan: TreeAttentionPlan, layout: Layout, members: list[int], start: int, stop: int) -> Block:
    """Rows `start` to `stop` of each member; requests with fewer rows repeat their last one."""
    num_rows = stop - start
    firsts = [plan.query_start[r] + start for r in members]
    is_run = all(plan.query_lens[r] >= stop for r in members) and firsts == list(
        range(firsts[0], firsts[0] + num_rows * len(members), num_rows)
    )
    rows = None
    if not is_run:
        index = [plan.query_start[r] + min(i, plan.query_lens[r] - 1) for r in members for i in range(start, stop)]
        rows = torch.tensor(index, device=layout.device)
    seen = plan.query_lens if plan.bidirectional else [min(n, stop) for n in plan.query_lens]
    key_lens = [plan.context_lens[r] + seen[r] for r in members]
    is_all = is_run and num_rows * len(members) == plan.num_rows
    return Block(
        first_row=None if is_all or not is_run else firsts[0],
        rows=rows,
        num_rows=num_rows,
        num_keys=max(key_lens),
        bias=_bias(plan, layout, members, start, stop, key_lens),
    )


def _note_order(plan: TreeAttentionPlan, members: list[int], group: Group, order: list[int], position: int) -> int:
    """Writes where the group's rows come out, from `position` on; returns where the next group's do."""
    start = 0
    for block in group.blocks:
        for request in members:
            first, count = plan.query_start[request] + start, min(plan.query_lens[request] - start, block.num_rows)
            if count > 0:
                order[first : first + count] = range(position, position + count)
            position += block.num_rows
        start += block.num_rows
    return position


def _bias(
    plan: TreeAttentionPlan, layout: Layout, members: list[int], start: int, stop: int, key_lens: list[int]
) -> torch.Tensor | None:
    """0 where a row sees a key, else -inf; None where every row sees all of `key_lens`."""
    num_rows, num_keys = stop - start, max(key_lens)
    if plan.bidirectional or stop == 1:
        if min(key_lens) == num_keys:
            return None
        is_hidden = (
            torch.arange(num_keys, device=layout.device) >= torch.tensor(key_lens, device=layout.device)[:, None]
        )
        bias = torch.zeros(is_hidden.shape, dtype=layout.dtype, device=layout.device)
        return bias.masked_fill_(is_hidden, float("-inf"))[:, None, None]
    bias = torch.zeros(len(members), num_rows, num_keys, dtype=layout.dtype, device=layout.device)
    for i, request in enumerate(members):
        context, last = plan.context_lens[request], min(plan.query_lens[request], stop)
        if key_lens[i] < num_keys:
            bias[i, :, key_lens[i] :] = float("-inf")
        if last <= start:
            continue
        if plan.is_chain[request]:
            own = _causal_bias(last - start, layout.dtype, layout.device)
            bias[i, : last - start, context + start : context + last] = own
        else:
            first = plan.query_start[request]
            own = _tree_bias(plan, layout)[first + start : first + last, :last]
            bias[i, : last - start, context : context + last] = own
    if layout.rows_per_query > 1:
        bias = bias.repeat_interleave(layout.rows_per_query, 1)
    return bias[:, None]


def _tree_bias(plan: TreeAttentionPlan, layout: Layout) -> torch.Tensor:
    """0 or -inf of each row toward the rows of its own tree, ``[T, 32 * W]``."""
    key = ("tree_bias", layout.dtype, layout.device)
    bias = plan.derived.get(key)
    if bias is None:
        octets = plan.ancestor_bits.view(torch.uint8).flatten().int().to(layout.device)
        bias = _octet_bias(layout.dtype, layout.device).index_select(0, octets).view(plan.num_rows, -1)
        plan.derived[key] = bias
    assert isinstance(bias, torch.Tensor)
    return bias


@lru_cache
def _octet_bias(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[256, 8]``: 0 where a bit of the number is set, lowest first, else -inf."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return torch.zeros(256, 8, dtype=dtype, device=device).masked_fill_(bits & 1 == 0, float("-inf"))


@lru_cache
def _causal_bias(num_rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[N, N]``: -inf above the diagonal."""
    return torch.full((num_rows, num_rows), float("-inf"), dtype=dtype, device=device).triu_(1)
