"""The Triton kernel: one launch for all requests, a second small one where keys are split over programs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from jetflow_kernels.aot import KernelConfiguration
from jetflow_kernels.tree_attention.metadata import Capacity, TreeAttentionMetadata
from jetflow_kernels.tree_attention.plan import TreeAttentionPlan
from jetflow_kernels.tree_attention.tuning import LARGE_TILE, MAX_SPLITS, Tile, choose_splits, choose_tile

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: All that a thread can have.
MAX_REGISTERS = 255
_LOG2_E = 1.4426950408889634


@triton.jit
def _load_tile(p_pages, b_page, b_offset, o_d, i_head, m_n, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
               NUM_KV_HEADS: tl.constexpr, IS_MASKED: tl.constexpr, IS_PADDED: tl.constexpr):  # fmt: skip
    # Slots are counted in 64 bits: pools larger than 2^31 elements are common.
    o_slot = b_page.to(tl.int64) * PAGE_SIZE + b_offset
    p_tile = p_pages + (o_slot * NUM_KV_HEADS + i_head)[:, None] * HEAD_DIM + o_d[None, :]
    if IS_MASKED:
        return tl.load(p_tile, mask=m_n[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    elif IS_PADDED:
        return tl.load(p_tile, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
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
def _scores(p_rows, b_q, p_k, b_page, b_offset, o_d, i_head, m_m, m_n, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
            PAGE_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, IS_MASKED: tl.constexpr, IS_PADDED: tl.constexpr,
            IS_FP32: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: products of the tile's rows with its keys."""
    if IS_FP32:
        # Outside of the tensor cores both operands lie in registers: in pieces of the head they do not spill.
        PIECE: tl.constexpr = 32
        o_piece = tl.arange(0, PIECE)
        b_scores = tl.zeros([b_q.shape[0], b_page.shape[0]], dtype=tl.float32)
        for i_piece in tl.static_range(BLOCK_D // PIECE):
            o_part = i_piece * PIECE + o_piece
            # [BLOCK_M, PIECE]
            m_part = m_m[:, None] & (o_part < HEAD_DIM)[None, :]
            b_part = tl.load(p_rows[:, None] + o_part[None, :], mask=m_part, other=0.0)
            # [BLOCK_N, PIECE]
            b_k = _load_tile(p_k, b_page, b_offset, o_part, i_head, m_n,
                             HEAD_DIM, PAGE_SIZE, NUM_KV_HEADS, IS_MASKED, IS_PADDED)  # fmt: skip
            b_scores += _dot(b_part, tl.trans(b_k), IS_FP32, INTERPRET)
    else:
        # [BLOCK_N, BLOCK_D]
        b_k = _load_tile(p_k, b_page, b_offset, o_d, i_head, m_n,
                         HEAD_DIM, PAGE_SIZE, NUM_KV_HEADS, IS_MASKED, IS_PADDED)  # fmt: skip
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
def tree_attention_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_tiles, p_requests, p_page_table, p_bits,
    scale, s_q_row, s_q_head, s_page_table, s_bits, s_split, num_splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_SPLIT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (tile, KV head, split): the rows of one tile over its share of the request's keys."""
    IS_FP32: tl.constexpr = p_q.dtype.element_ty == tl.float32
    IS_PADDED: tl.constexpr = BLOCK_D != HEAD_DIM
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
    o_m = tl.arange(0, BLOCK_M)
    o_row = first_row + o_m // GROUP
    m_m = (o_m < (BLOCK_M // GROUP) * GROUP) & (o_row < num_rows)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    o_head = i_head * GROUP + o_m % GROUP
    # [BLOCK_M, BLOCK_D]
    p_rows = p_q + (batch_row + o_row).to(tl.int64) * s_q_row + o_head * s_q_head
    b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)

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
        if PAGE_SIZE % BLOCK_N == 0:
            b_page = tl.load(p_table + (i_key * BLOCK_N) // PAGE_SIZE) + tl.zeros([BLOCK_N], dtype=tl.int32)
            b_offset = (i_key * BLOCK_N) % PAGE_SIZE + o_n
        else:
            o_key = i_key * BLOCK_N + o_n
            # [BLOCK_N]
            b_page = tl.load(p_table + o_key // PAGE_SIZE)
            b_offset = o_key % PAGE_SIZE
        b_scores = scale * _scores(
            p_rows, b_q, p_k, b_page, b_offset, o_d, i_head, m_m, o_n < BLOCK_N,
            HEAD_DIM, BLOCK_D, PAGE_SIZE, NUM_KV_HEADS, False, IS_PADDED, IS_FP32, INTERPRET,
        )  # fmt: skip
        # [BLOCK_N, BLOCK_D]
        b_v = _load_tile(p_v, b_page, b_offset, o_d, i_head, o_n < BLOCK_N,
                         HEAD_DIM, PAGE_SIZE, NUM_KV_HEADS, False, IS_PADDED)  # fmt: skip
        b_acc, b_max, b_sum = _fold(b_scores, b_v, b_acc, b_max, b_sum, IS_FP32, INTERPRET)

    # The rest, key by key: the end of the context and the rows of the request itself. The last split takes it.
    end = context + num_rows
    if mode == 1:
        end = tl.minimum(end, context + first_row + BLOCK_M // GROUP)
    if i_split < num_splits - 1:
        end = 0
    num_tree_rows = tl.where(mode == 0, num_rows, 0)
    # [BLOCK_M]: last row that each row sees without asking for ancestors; the context's keys lie before row 0.
    o_last = tl.where(mode == 1, o_row, tl.where(mode == 2, num_rows, -1))
    for start in range(num_open * BLOCK_N, end, BLOCK_N):
        o_key = start + o_n
        m_n = o_key < end
        # [BLOCK_N]
        b_page = tl.load(p_table + o_key // PAGE_SIZE, mask=m_n, other=0)
        b_offset = o_key % PAGE_SIZE
        b_scores = scale * _scores(
            p_rows, b_q, p_k, b_page, b_offset, o_d, i_head, m_m, m_n,
            HEAD_DIM, BLOCK_D, PAGE_SIZE, NUM_KV_HEADS, True, IS_PADDED, IS_FP32, INTERPRET,
        )  # fmt: skip
        o_own = o_key - context
        # [BLOCK_M, BLOCK_N]: words of ancestors, of trees only.
        m_bits = m_m[:, None] & ((o_own >= 0) & (o_own < num_tree_rows))[None, :]
        p_words = p_bits + (batch_row + o_row).to(tl.int64)[:, None] * s_bits + (o_own // 32)[None, :]
        b_words = tl.load(p_words, mask=m_bits, other=0)
        is_ancestor = ((b_words >> (o_own % 32)[None, :]) & 1) != 0
        is_seen = is_ancestor | (o_own[None, :] <= o_last[:, None])
        b_scores = tl.where(is_seen & m_n[None, :] & m_m[:, None], b_scores, float("-inf"))
        # [BLOCK_N, BLOCK_D]
        b_v = _load_tile(p_v, b_page, b_offset, o_d, i_head, m_n, HEAD_DIM, PAGE_SIZE, NUM_KV_HEADS, True, IS_PADDED)
        b_acc, b_max, b_sum = _fold(b_scores, b_v, b_acc, b_max, b_sum, IS_FP32, INTERPRET)

    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_acc = b_acc / b_divisor[:, None]
    o_out = (batch_row + o_row).to(tl.int64) * (NUM_KV_HEADS * GROUP) + o_head
    if IS_SPLIT:
        b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(b_divisor))
        o_out += tl.cast(i_split, tl.int64) * s_split
        tl.store(p_lse + o_out, b_lse, mask=m_m)
    m_out = m_m[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_out + o_out[:, None] * HEAD_DIM + o_d[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def combine_kernel(
    p_partial, p_lse, p_out, num_splits, s_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
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
    p_parts = p_partial + (o_s.to(tl.int64) * s_split + i_out)[:, None] * HEAD_DIM + o_d[None, :]
    b_parts = tl.load(p_parts, mask=m_s[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    b_out = tl.sum(b_parts * b_weights[:, None], 0)
    tl.store(p_out + i_out * HEAD_DIM + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < HEAD_DIM)


def tree_attention_triton(
    plan: TreeAttentionPlan, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """See `jetflow_kernels.tree_attention.tree_attention`. What the launch needs to know of the batch is made at the
    first layer and kept in the plan."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    key = ("triton", q.dtype, num_heads, num_kv_heads, head_dim)
    metadata = plan.derived.get(key)
    if metadata is None:
        metadata = plan.derived[key] = make_metadata(plan, q, num_kv_heads)
    assert isinstance(metadata, TreeAttentionMetadata)
    if not num_rows:
        return torch.empty_like(q)
    return attend(metadata, q, k_pages, v_pages, scale=scale)


def make_metadata(plan: TreeAttentionPlan, q: torch.Tensor, num_kv_heads: int) -> TreeAttentionMetadata:
    """Tiles and splits of a batch for rows like ``q`` ``[T, num_heads, head_dim]``."""
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
    """The launches of one layer. Rows of q behind the batch's last one are left undefined in the result."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_splits = k_pages.shape[2], metadata.num_splits
    group = num_heads // num_kv_heads
    tile = choose_tile(q.dtype, head_dim, metadata.tile_rows * group)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial, lse = out, out
    if num_splits > 1:
        partial = torch.empty(num_splits, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_splits, num_rows, num_heads, dtype=torch.float32, device=q.device)
    constants = _constants(tile, num_kv_heads, group, head_dim, k_pages.shape[1], is_split=num_splits > 1)
    tree_attention_kernel[(metadata.capacity.num_tiles, num_kv_heads, num_splits)](
        q, k_pages, v_pages, partial, lse,
        metadata.tiles, metadata.requests, metadata.page_table, metadata.ancestor_bits,
        scale * _LOG2_E, q.stride(0), q.stride(1),
        metadata.page_table.stride(0), metadata.ancestor_bits.stride(0), num_rows * num_heads, num_splits,
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    if num_splits > 1:
        combine_kernel[(num_rows * num_heads,)](
            partial, lse, out, num_splits, num_rows * num_heads, **_combine_constants(head_dim, num_splits), num_warps=4
        )
    return out


def shipped_configurations() -> list[KernelConfiguration]:
    """Every tile with and without splits; numbers of heads and page sizes take turns."""
    found = []
    shapes = _shapes()
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            tiles = {choose_tile(dtype, head_dim, rows) for rows in (1, LARGE_TILE)}
            for tile in sorted(tiles, key=lambda t: t.block_m):
                for is_split in (False, True):
                    kv_heads, group, page_size = next(shapes)
                    found.append(_configuration(dtype, tile, head_dim, kv_heads, group, page_size, is_split=is_split))
    for head_dim in HEAD_DIMS:
        for num_splits in (2, MAX_SPLITS):
            constants = _combine_constants(head_dim, num_splits)
            types = {"p_partial": "*fp32", "p_lse": "*fp32", "p_out": "*bf16", "num_splits": "i32", "s_split": "i32"}
            found.append(
                KernelConfiguration(
                    name=f"tree_attention_combine-d{head_dim}-s{constants['BLOCK_S']}",
                    kernel=combine_kernel,
                    types=types,
                    constants=constants,
                    num_warps=4,
                    num_stages=2,
                )
            )
    return found


def _shapes() -> Iterator[tuple[int, int, int]]:
    """KV heads, query heads of each, and page size."""
    while True:
        yield from ((8, 4, 16), (2, 1, 64), (4, 2, 128), (1, 8, 256), (8, 5, 32), (16, 1, 16), (4, 4, 48))


def _configuration(
    dtype: torch.dtype, tile: Tile, head_dim: int, kv_heads: int, group: int, page_size: int, *, is_split: bool
) -> KernelConfiguration:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    half = f"*{name}"
    tables = dict.fromkeys(("p_tiles", "p_requests", "p_page_table", "p_bits"), "*i32")
    numbers = dict.fromkeys(("s_q_row", "s_q_head", "s_page_table", "s_bits", "s_split", "num_splits"), "i32")
    shape = f"d{head_dim}-m{tile.block_m}-g{group}-p{page_size}"
    return KernelConfiguration(
        name=f"tree_attention-{name}-{shape}" + ("-split" if is_split else ""),
        kernel=tree_attention_kernel,
        types={"p_q": half, "p_k": half, "p_v": half}
        | {"p_out": "*fp32" if is_split else half, "p_lse": "*fp32" if is_split else half}
        | tables
        | {"scale": "fp32"}
        | numbers,
        constants=_constants(tile, kv_heads, group, head_dim, page_size, is_split=is_split, interpret=False),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=MAX_REGISTERS,
        may_spill=head_dim > 128,
    )


def _constants(
    tile: Tile,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    *,
    is_split: bool,
    interpret: bool | None = None,
) -> dict[str, Any]:
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "PAGE_SIZE": page_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "IS_SPLIT": is_split,
        "INTERPRET": _is_interpreted() if interpret is None else interpret,
    }


def _combine_constants(head_dim: int, num_splits: int) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_S": triton.next_power_of_2(num_splits),
    }


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _num_sms(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 1
