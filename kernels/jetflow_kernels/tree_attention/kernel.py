"""The Triton kernel: one launch for all requests, a second small one where keys are split over programs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from jetflow_kernels.aot import KernelConfiguration
from jetflow_kernels.shipped import DTYPES, HEAD_DIMS, TRITON_NAMES, check_head_dim, is_interpreted
from jetflow_kernels.tree_attention.metadata import Capacity, TreeAttentionMetadata
from jetflow_kernels.tree_attention.plan import TreeAttentionPlan
from jetflow_kernels.tree_attention.tuning import LARGE_TILE, MAX_SPLITS, Tile, choose_splits, choose_tile

#: All that a thread can have.
MAX_REGISTERS = 255
_LOG2_E = 1.4426950408889634


@triton.jit
def _load_tile(p_pages, b_row, o_d, m_n, head_dim, IS_MASKED: tl.constexpr, IS_PADDED: tl.constexpr):
    # int64 [BLOCK_N, BLOCK_D]
    p_tile = p_pages + b_row[:, None] * head_dim + o_d[None, :]
    if IS_MASKED:
        return tl.load(p_tile, mask=m_n[:, None] & (o_d < head_dim)[None, :], other=0.0)
    elif IS_PADDED:
        return tl.load(p_tile, mask=(o_d < head_dim)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def _dot(b_left, b_right, IS_FP32: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:
        # The interpreter multiplies the bit patterns of bf16.
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), input_precision="ieee")
    elif IS_FP32:
        return tl.dot(b_left, b_right, input_precision="ieee")
    else:
        return tl.dot(b_left, b_right)


@triton.jit
def _scores(p_rows, b_q, p_k, b_row, o_d, m_m, m_n, head_dim, BLOCK_D: tl.constexpr,
            IS_MASKED: tl.constexpr, IS_PADDED: tl.constexpr, IS_FP32: tl.constexpr,
            INTERPRET: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: products of the tile's rows with its keys."""
    if IS_FP32:
        # Outside of the tensor cores both operands lie in registers: in pieces of the head they do not spill.
        PIECE: tl.constexpr = 32
        o_piece = tl.arange(0, PIECE)
        b_scores = tl.zeros([b_q.shape[0], b_row.shape[0]], dtype=tl.float32)
        for i_piece in tl.static_range(BLOCK_D // PIECE):
            o_part = i_piece * PIECE + o_piece
            # [BLOCK_M, PIECE]
            m_part = m_m[:, None] & (o_part < head_dim)[None, :]
            b_part = tl.load(p_rows[:, None] + o_part[None, :], mask=m_part, other=0.0)
            # [BLOCK_N, PIECE]
            b_k = _load_tile(p_k, b_row, o_part, m_n, head_dim, IS_MASKED, IS_PADDED)
            b_scores += _dot(b_part, tl.trans(b_k), IS_FP32, INTERPRET)
    else:
        # [BLOCK_N, BLOCK_D]
        b_k = _load_tile(p_k, b_row, o_d, m_n, head_dim, IS_MASKED, IS_PADDED)
        b_scores = _dot(b_q, tl.trans(b_k), IS_FP32, INTERPRET)
    return b_scores


@triton.jit
def _fold(b_scores, b_v, b_acc, b_max, b_sum, IS_FP32: tl.constexpr, INTERPRET: tl.constexpr):
    """One tile of keys into the running softmax; scores are base-2 logarithms."""
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
    # A row that saw no key so far has a maximum of -inf, from which nothing may be subtracted.
    b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_weights = tl.exp2(b_scores - b_base[:, None])
    b_decay = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
    b_acc = b_acc * b_decay[:, None] + _dot(b_weights.to(b_v.dtype), b_v, IS_FP32, INTERPRET)
    return b_acc, b_new_max, b_sum


@triton.jit
def _kv_row(p_table, o_key, m_n, page_size, num_kv_heads, i_head, IS_MASKED: tl.constexpr):
    """int64 [BLOCK_N]: where each key's vector of this head lies, in vectors. Pools past 2^31 elements are common."""
    # [BLOCK_N]
    if IS_MASKED:
        b_page = tl.load(p_table + o_key // page_size, mask=m_n, other=0)
    else:
        b_page = tl.load(p_table + o_key // page_size)
    return (b_page.to(tl.int64) * page_size + o_key % page_size) * num_kv_heads + i_head


# Numbers that differ from batch to batch, or from model to model, must not each ask for a kernel of their own.
@triton.jit(
    do_not_specialize=["s_page_table", "s_bits", "s_split", "num_splits", "num_kv_heads", "group", "page_size"],
    do_not_specialize_on_alignment=["p_tiles", "p_requests", "p_page_table", "p_bits"],
)
def tree_attention_kernel(
    p_q, p_k, p_v, p_out, p_partial, p_lse, p_tiles, p_requests, p_page_table, p_bits,
    scale, s_q_row, s_q_head, s_page_table, s_bits, s_split, num_splits, num_kv_heads, group, page_size, size,
    BLOCK_D: tl.constexpr, IS_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (tile, KV head, split): the rows of one tile over its share of the request's keys."""
    IS_FP32: tl.constexpr = p_q.dtype.element_ty == tl.float32
    # Sizes between powers of two share a kernel; the others know theirs when they are compiled.
    head_dim = size if IS_PADDED else BLOCK_D
    i_tile, i_head, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_request = tl.load(p_tiles + i_tile * 2)
    if i_request < 0:
        return
    first_row = tl.load(p_tiles + i_tile * 2 + 1)
    batch_row = tl.load(p_requests + i_request * 4)
    num_rows = tl.load(p_requests + i_request * 4 + 1)
    context = tl.load(p_requests + i_request * 4 + 2)
    mode = tl.load(p_requests + i_request * 4 + 3)

    # [BLOCK_M]: heads of one KV head lie beside each other, row by row.
    tile_rows = BLOCK_M // group
    o_m = tl.arange(0, BLOCK_M)
    o_row = first_row + o_m // group
    m_m = (o_m < tile_rows * group) & (o_row < num_rows)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    o_head = i_head * group + o_m % group
    # [BLOCK_M, BLOCK_D]
    p_rows = p_q + (batch_row + o_row).to(tl.int64) * s_q_row + o_head * s_q_head
    b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < head_dim)[None, :], other=0.0)

    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    p_table = p_page_table + i_request.to(tl.int64) * s_page_table

    # Keys that every row of the tile sees: the context, and in a chain the rows before the tile.
    seen_by_all = context + tl.where(mode == 1, first_row, 0)
    num_open = seen_by_all // BLOCK_N
    per_split = (num_open + num_splits - 1) // num_splits
    first_open = i_split * per_split
    last_open = tl.minimum(first_open + per_split, num_open)
    for i_key in range(first_open, last_open):
        m_n = o_n < BLOCK_N
        b_row = _kv_row(p_table, i_key * BLOCK_N + o_n, m_n, page_size, num_kv_heads, i_head, False)
        b_scores = scale * _scores(p_rows, b_q, p_k, b_row, o_d, m_m, m_n,
                                   head_dim, BLOCK_D, False, IS_PADDED, IS_FP32, INTERPRET)  # fmt: skip
        # [BLOCK_N, BLOCK_D]
        b_v = _load_tile(p_v, b_row, o_d, m_n, head_dim, False, IS_PADDED)
        b_acc, b_max, b_sum = _fold(b_scores, b_v, b_acc, b_max, b_sum, IS_FP32, INTERPRET)

    # The rest, key by key: the end of the context and the rows of the request itself. The last split takes it.
    end = context + num_rows
    if mode == 1:
        end = tl.minimum(end, context + first_row + tile_rows)
    if i_split < num_splits - 1:
        end = 0
    num_tree_rows = tl.where(mode == 0, num_rows, 0)
    # [BLOCK_M]: last row that each row sees without asking for ancestors; the context's keys lie before row 0.
    o_last = tl.where(mode == 1, o_row, tl.where(mode == 2, num_rows, -1))
    for start in range(num_open * BLOCK_N, end, BLOCK_N):
        o_key = start + o_n
        m_n = o_key < end
        b_row = _kv_row(p_table, o_key, m_n, page_size, num_kv_heads, i_head, True)
        b_scores = scale * _scores(p_rows, b_q, p_k, b_row, o_d, m_m, m_n,
                                   head_dim, BLOCK_D, True, IS_PADDED, IS_FP32, INTERPRET)  # fmt: skip
        o_own = o_key - context
        # [BLOCK_M, BLOCK_N]: words of ancestors, of trees only.
        m_bits = m_m[:, None] & ((o_own >= 0) & (o_own < num_tree_rows))[None, :]
        p_words = p_bits + (batch_row + o_row).to(tl.int64)[:, None] * s_bits + (o_own // 32)[None, :]
        b_words = tl.load(p_words, mask=m_bits, other=0)
        is_ancestor = ((b_words >> (o_own % 32)[None, :]) & 1) != 0
        is_seen = is_ancestor | (o_own[None, :] <= o_last[:, None])
        b_scores = tl.where(is_seen & m_n[None, :] & m_m[:, None], b_scores, float("-inf"))
        # [BLOCK_N, BLOCK_D]
        b_v = _load_tile(p_v, b_row, o_d, m_n, head_dim, True, IS_PADDED)
        b_acc, b_max, b_sum = _fold(b_scores, b_v, b_acc, b_max, b_sum, IS_FP32, INTERPRET)

    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_acc = b_acc / b_divisor[:, None]
    o_out = (batch_row + o_row).to(tl.int64) * (num_kv_heads * group) + o_head
    m_out = m_m[:, None] & (o_d < head_dim)[None, :]
    if num_splits > 1:
        b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(b_divisor))
        o_out += tl.cast(i_split, tl.int64) * s_split
        tl.store(p_lse + o_out, b_lse, mask=m_m)
        tl.store(p_partial + o_out[:, None] * head_dim + o_d[None, :], b_acc, mask=m_out)
    else:
        tl.store(p_out + o_out[:, None] * head_dim + o_d[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["num_splits", "s_split"])
def combine_kernel(p_partial, p_lse, p_out, num_splits, s_split, head_dim, BLOCK_D: tl.constexpr,
                   BLOCK_S: tl.constexpr):  # fmt: skip
    """Program (row and head): the splits' outputs, weighed by their shares of the softmax's sum."""
    i_out = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_s = o_s < num_splits
    # [BLOCK_S]
    b_lse = tl.load(p_lse + o_s.to(tl.int64) * s_split + i_out, mask=m_s, other=float("-inf"))
    b_weights = tl.exp2(b_lse - tl.max(b_lse, 0))
    b_weights = b_weights / tl.sum(b_weights, 0)
    # [BLOCK_S, BLOCK_D]
    p_parts = p_partial + (o_s.to(tl.int64) * s_split + i_out)[:, None] * head_dim + o_d[None, :]
    b_parts = tl.load(p_parts, mask=m_s[:, None] & (o_d < head_dim)[None, :], other=0.0)
    b_out = tl.sum(b_parts * b_weights[:, None], 0)
    tl.store(p_out + i_out * head_dim + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < head_dim)


def tree_attention_triton(
    plan: TreeAttentionPlan, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """See `jetflow_kernels.tree_attention.tree_attention`. What the launch needs to know of the batch is made at the
    first layer and kept in the plan."""
    if not q.shape[0]:
        return torch.empty_like(q)
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], k_pages.shape[2]
    key = ("triton", q.dtype, num_heads, num_kv_heads, head_dim)
    metadata = plan.derived.get(key)
    if metadata is None:
        metadata = plan.derived[key] = make_metadata(plan, q, num_kv_heads)
    assert isinstance(metadata, TreeAttentionMetadata)
    return attend(metadata, q, k_pages, v_pages, scale=scale)


def make_metadata(plan: TreeAttentionPlan, q: torch.Tensor, num_kv_heads: int) -> TreeAttentionMetadata:
    """Tiles and splits of a batch for rows like ``q`` ``[T, num_heads, head_dim]``.

    Raises:
        ValueError: more query heads share a KV head than a tile has rows.
    """
    group = q.shape[1] // num_kv_heads
    tile = choose_tile(q.dtype, q.shape[2], max(plan.query_lens, default=1) * group)
    if tile.block_m < group:
        raise ValueError(f"{group} query heads share a KV head: at most {tile.block_m} are served")
    capacity = Capacity.of(plan, tile.block_m // group)
    num_key_tiles = max(plan.context_lens, default=0) // tile.block_n
    num_splits = choose_splits(capacity.num_tiles * num_kv_heads, num_key_tiles, _num_sms(q.device))
    metadata = TreeAttentionMetadata.allocate(
        capacity, tile_rows=tile.block_m // group, num_splits=num_splits, device=q.device
    )
    metadata.fill(plan)
    return metadata


def attend(
    metadata: TreeAttentionMetadata, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """The launches of one layer. Rows of q behind the batch's last one are left undefined in the result.

    Raises:
        NotImplementedError: a head size that no kernel is shipped for.
    """
    num_rows, num_heads, head_dim = q.shape
    check_head_dim("tree_attention", head_dim)
    num_kv_heads, num_splits = k_pages.shape[2], metadata.num_splits
    group = num_heads // num_kv_heads
    tile = choose_tile(q.dtype, head_dim, metadata.tile_rows * group)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial = lse = metadata.no_splits
    if num_splits > 1:
        partial = torch.empty(num_splits, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_splits, num_rows, num_heads, dtype=torch.float32, device=q.device)
    tree_attention_kernel[(metadata.capacity.num_tiles, num_kv_heads, num_splits)](
        q, k_pages, v_pages, out, partial, lse,
        metadata.tiles, metadata.requests, metadata.page_table, metadata.ancestor_bits,
        scale * _LOG2_E, q.stride(0), q.stride(1), metadata.page_table.stride(0), metadata.ancestor_bits.stride(0),
        num_rows * num_heads, num_splits, num_kv_heads, group, k_pages.shape[1], head_dim,
        **_constants(tile, head_dim, interpret=is_interpreted()),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    if num_splits > 1:
        combine_kernel[(num_rows * num_heads,)](
            partial, lse, out, num_splits, num_rows * num_heads, head_dim, **_combine_constants(head_dim), num_warps=4
        )
    return out


def shipped_configurations() -> list[KernelConfiguration]:
    """Every tile of every head size and dtype. Heads, page sizes, trees and splits are arguments, so that these are all
    kernels that a launch can ask for."""
    found = []
    for dtype in DTYPES:
        # Of the sizes that are padded to the same one, the first stands for all.
        for head_dim in {_padding(head_dim): head_dim for head_dim in reversed(HEAD_DIMS)}.values():
            tiles = {choose_tile(dtype, head_dim, rows) for rows in (1, LARGE_TILE)}
            found += [_configuration(dtype, tile, head_dim) for tile in sorted(tiles, key=lambda t: t.block_m)]
        for block_d in sorted({triton.next_power_of_2(d) for d in HEAD_DIMS}):
            found.append(_combine_configuration(dtype, block_d))
    return found


def _padding(head_dim: int) -> tuple[int, bool]:
    """Size that a head is computed with, and whether that is another one."""
    block_d = triton.next_power_of_2(head_dim)
    return block_d, block_d != head_dim


def _configuration(dtype: torch.dtype, tile: Tile, head_dim: int) -> KernelConfiguration:
    name = TRITON_NAMES[dtype]
    sizes = "+".join(str(d) for d in HEAD_DIMS if _padding(d) == _padding(head_dim))
    tables = dict.fromkeys(("p_tiles", "p_requests", "p_page_table", "p_bits"), "*i32")
    numbers = ("s_page_table", "s_bits", "s_split", "num_splits", "num_kv_heads", "group", "page_size")
    return KernelConfiguration(
        name=f"tree_attention-{name}-d{sizes}-m{tile.block_m}",
        kernel=tree_attention_kernel,
        types=dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), f"*{name}")
        | dict.fromkeys(("p_partial", "p_lse"), "*fp32")
        | tables
        | {"scale": "fp32", "s_q_row": "i32", "s_q_head": "i32", "size": "i32"}
        | dict.fromkeys(numbers, "i32"),
        multiples_of_16=frozenset({"p_q", "p_k", "p_v", "p_out", "p_partial", "p_lse", "s_q_row", "s_q_head", "size"}),
        constants=_constants(tile, head_dim, interpret=False),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=MAX_REGISTERS,
        may_spill=head_dim > 128,
    )


def _combine_configuration(dtype: torch.dtype, block_d: int) -> KernelConfiguration:
    types = {"p_partial": "*fp32", "p_lse": "*fp32", "p_out": f"*{TRITON_NAMES[dtype]}"}
    return KernelConfiguration(
        name=f"tree_attention_combine-{TRITON_NAMES[dtype]}-d{block_d}",
        kernel=combine_kernel,
        types=types | dict.fromkeys(("num_splits", "s_split", "head_dim"), "i32"),
        multiples_of_16=frozenset({*types, "head_dim"}),
        constants=_combine_constants(block_d),
        num_warps=4,
        num_stages=3,
    )


def _constants(tile: Tile, head_dim: int, *, interpret: bool) -> dict[str, Any]:
    block_d, is_padded = _padding(head_dim)
    return {
        "BLOCK_D": block_d,
        "IS_PADDED": is_padded,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "INTERPRET": interpret,
    }


def _combine_constants(head_dim: int) -> dict[str, Any]:
    return {"BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_S": MAX_SPLITS}


def _num_sms(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 1
