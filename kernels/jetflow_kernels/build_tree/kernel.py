"""The Triton kernels: order siblings, grow each tree, order all nodes, cut, and lay out the rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from jetflow_kernels.aot import KernelConfiguration
from jetflow_kernels.build_tree.buffers import (
    MAX_DEPTH,
    MAX_NODES,
    MAX_ROWS,
    MAX_WIDTH,
    VALUE_UNIT,
    WORDS_OF_PATHS,
    Candidates,
    RowLayout,
    TreeBuffers,
    TreeLimits,
)
from jetflow_kernels.shipped import size_class

#: Rows of siblings and nodes that one program takes.
BLOCK_SIBLINGS, BLOCK_NODES = 16, 16
#: Sizes that code is compiled for; a batch takes the smallest that holds it. Everything else about it is an argument.
TREE_BLOCKS = (32, 128, MAX_NODES)
BATCH_BLOCKS = (64, 512)
SEARCH_BLOCKS = (4, 64)
CUT_BLOCKS = (512, MAX_ROWS)
WORD_BLOCKS = (4, MAX_NODES // 32)
#: Nodes that one program lays out.
BLOCK_ROWS = 32
#: All that a thread can have; less would spill where paths are long.
MAX_REGISTERS = 255
#: Depths whose ranks share a word of a path.
DEPTHS_PER_WORD = tl.constexpr(15)
_NONE = tl.constexpr(-(2**31))
_NEVER = tl.constexpr(2**31 - 1)
_VALUE_UNIT = tl.constexpr(VALUE_UNIT)


@triton.jit(do_not_specialize=["num_rows", "rows_per_request", "width"])
def order_siblings_kernel(
    p_scores, p_limits, p_siblings, num_rows, rows_per_request, width, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of rows): score and rank of each candidate in one number, the best first."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = i_row < num_rows
    o_w = tl.arange(0, BLOCK_W)
    # [BLOCK]
    b_width = tl.load(p_limits + (i_row // rows_per_request) * 4 + 2, mask=m_row, other=0)
    m_w = m_row[:, None] & (o_w < width)[None, :] & (o_w[None, :] < b_width[:, None])
    # [BLOCK, BLOCK_W]
    o_score = i_row.to(tl.int64)[:, None] * width + o_w[None, :]
    b_score = tl.load(p_scores + o_score, mask=m_w, other=0)
    b_packed = tl.where(m_w, b_score * 16 + 15 - o_w[None, :], _NONE)
    # [BLOCK, BLOCK_W, BLOCK_W]: no two candidates of a row are equal.
    is_before = b_packed[:, None, :] > b_packed[:, :, None]
    o_place = tl.sum(is_before.to(tl.int32), 2)
    o_out = i_row.to(tl.int64)[:, None] * 16 + o_place
    tl.store(p_siblings + o_out, b_packed, mask=m_w)


@triton.jit(do_not_specialize=["N", "D", "P", "W"])
def grow_kernel(
    p_ids, p_siblings, p_anchors, p_limits,
    p_tokens, p_parents, p_depths, p_scores, p_ranks, p_grown,
    N, D, P, W, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (request): takes its nodes best first. Each node offers its best child that is not taken yet."""
    i_request = tl.program_id(0)
    max_nodes = tl.minimum(tl.load(p_limits + i_request * 4), N)
    max_depth = tl.minimum(tl.load(p_limits + i_request * 4 + 1), D)
    width = tl.minimum(tl.load(p_limits + i_request * 4 + 2), W)
    p_table = p_siblings + i_request.to(tl.int64) * (D * P * 16)
    p_request_ids = p_ids + i_request.to(tl.int64) * (D * W)
    o_first = i_request.to(tl.int64) * N
    m_root = max_nodes > 0
    tl.store(p_tokens + o_first, tl.load(p_anchors + i_request).to(tl.int32), mask=m_root)
    tl.store(p_parents + o_first, -1, mask=m_root)
    tl.store(p_depths + o_first, 0, mask=m_root)
    tl.store(p_scores + o_first, 0, mask=m_root)
    tl.store(p_ranks + o_first, 0, mask=m_root)

    o_n = tl.arange(0, BLOCK_N)
    m_first = (o_n == 0) & (max_nodes > 1) & (max_depth > 0) & (width > 0)
    first = tl.load(p_table)
    # [BLOCK_N], of each node: score of the child that it offers, and that child's place among its siblings.
    b_offer = tl.where(m_first, first >> 4, _NONE)
    b_place = tl.zeros([BLOCK_N], dtype=tl.int32)
    # [BLOCK_N], of each node: depth, rank, place among the taken nodes of its depth by their ranks from the root, and
    # that place of its parent.
    b_depth = tl.where(o_n == 0, 0, -1)
    b_rank = tl.zeros([BLOCK_N], dtype=tl.int32)
    b_lex = tl.zeros([BLOCK_N], dtype=tl.int32)
    b_parent_lex = tl.zeros([BLOCK_N], dtype=tl.int32)

    count = tl.where(m_root, 1, 0)
    b_key = (b_offer.to(tl.int64) << 32) | ((255 - b_depth) << 16 | (65535 - b_lex)).to(tl.int64)
    best = tl.max(b_key, 0)
    while (count < max_nodes) & ((best >> 32) > _NONE):
        m_parent = b_key == best
        score = (best >> 32).to(tl.int32)
        depth = 256 - ((best >> 16) & 0xFFFF).to(tl.int32)
        parent_lex = 65535 - (best & 0xFFFF).to(tl.int32)
        state = tl.sum(tl.where(m_parent, o_n << 9 | b_place << 4 | b_rank, 0), 0)
        parent, place, parent_rank = state >> 9, (state >> 4) & 31, state & 15

        # The node, its next sibling and its first child.
        p_row = p_table + (depth - 1) * (P * 16)
        p_row += tl.where((P > 1) & (depth > 1), parent_rank, 0) * 16
        packed = tl.load(p_row + place)
        rank = 15 - (packed & 15)
        m_sibling = place + 1 < width
        sibling = tl.load(p_row + place + 1, mask=m_sibling, other=0)
        m_child = depth < max_depth
        p_child = p_table + depth * (P * 16)
        p_child += tl.where(P > 1, rank, 0) * 16
        child = tl.load(p_child, mask=m_child, other=0)
        token = tl.load(p_request_ids + (depth - 1) * W + rank).to(tl.int32)
        tl.store(p_tokens + o_first + count, token)
        tl.store(p_parents + o_first + count, parent)
        tl.store(p_depths + o_first + count, depth)
        tl.store(p_scores + o_first + count, score)
        tl.store(p_ranks + o_first + count, rank)

        m_level = b_depth == depth
        is_before = (b_parent_lex < parent_lex) | ((b_parent_lex == parent_lex) & (b_rank < rank))
        lex = tl.sum((m_level & is_before).to(tl.int32), 0)
        b_lex += (m_level & (b_lex >= lex)).to(tl.int32)
        b_parent_lex += ((b_depth == depth + 1) & (b_parent_lex >= lex)).to(tl.int32)

        m_new = o_n == count
        next_offer = tl.where(m_sibling, score - (packed >> 4) + (sibling >> 4), _NONE)
        b_offer = tl.where(m_parent, next_offer, b_offer)
        b_offer = tl.where(m_new, tl.where(m_child, score + (child >> 4), _NONE), b_offer)
        b_place += m_parent.to(tl.int32)
        b_depth = tl.where(m_new, depth, b_depth)
        b_rank = tl.where(m_new, rank, b_rank)
        b_lex = tl.where(m_new, lex, b_lex)
        b_parent_lex = tl.where(m_new, parent_lex, b_parent_lex)
        count += 1
        b_key = (b_offer.to(tl.int64) << 32) | ((255 - b_depth) << 16 | (65535 - b_lex)).to(tl.int64)
        best = tl.max(b_key, 0)
    tl.store(p_grown + i_request, count)


@triton.jit(do_not_specialize=["N", "s_word"])
def trace_paths_kernel(
    p_parents, p_depths, p_ranks, p_grown, p_paths, N, s_word, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (request, block of nodes): the ranks from the root to each node, the first depth in the highest bits."""
    i_request = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_first = i_request.to(tl.int64) * N
    m_n = o_n < tl.load(p_grown + i_request)
    for i_word in tl.static_range(WORDS):
        b_node = tl.where(m_n, o_n, 0)
        b_path = tl.zeros([BLOCK], dtype=tl.int64)
        # [BLOCK]
        b_depth = tl.load(p_depths + o_first + b_node, mask=m_n, other=0)
        while tl.max(b_depth, 0) > 0:
            m_walk = b_depth > 0
            b_rank = tl.load(p_ranks + o_first + b_node, mask=m_walk, other=0)
            o_level = b_depth - 1 - i_word * DEPTHS_PER_WORD
            m_word = m_walk & (o_level >= 0) & (o_level < DEPTHS_PER_WORD)
            b_shift = tl.where(m_word, 4 * (DEPTHS_PER_WORD - 1 - o_level), 0).to(tl.int64)
            b_path |= tl.where(m_word, b_rank.to(tl.int64) << b_shift, 0)
            b_node = tl.load(p_parents + o_first + b_node, mask=m_walk, other=0)
            b_depth = tl.where(m_walk, b_depth - 1, 0)
        tl.store(p_paths + i_word * s_word + o_first + o_n, b_path, mask=m_n)


@triton.jit(do_not_specialize=["N", "num_requests", "s_word", "table_len", "num_values", "num_steps", "has_cost"])
def order_nodes_kernel(
    p_scores, p_depths, p_paths, p_grown, p_limits, p_value_table, p_order, p_values,
    N, num_requests, s_word, table_len, num_values, num_steps, has_cost,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (request, block of nodes): how many nodes of all requests come before each; nodes of one request are in
    order, so a binary search in each request tells."""
    i_request = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_own = i_request.to(tl.int64) * N + o_n
    m_n = (o_n > 0) & (o_n < tl.load(p_grown + i_request))
    # [BLOCK]
    b_score = tl.load(p_scores + o_own, mask=m_n, other=0).to(tl.int64) + tl.load(p_limits + i_request * 4 + 3)
    b_depth = tl.load(p_depths + o_own, mask=m_n, other=0)
    b_before = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, num_requests, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        m_r = o_r < num_requests
        o_base = o_r.to(tl.int64) * N
        # [BLOCK_R]
        b_bias = tl.load(p_limits + o_r * 4 + 3, mask=m_r, other=0).to(tl.int64)
        b_grown = tl.load(p_grown + o_r, mask=m_r, other=0)
        # [BLOCK, BLOCK_R]: nodes from 1 to low - 1 come before, those from high on do not.
        b_low = tl.full([BLOCK, BLOCK_R], 1, dtype=tl.int32)
        b_high = tl.maximum(b_grown, 1)[None, :] + tl.zeros([BLOCK, BLOCK_R], dtype=tl.int32)
        for _ in range(num_steps):
            m_open = m_n[:, None] & m_r[None, :] & (b_low < b_high)
            b_middle = (b_low + b_high) // 2
            o_middle = o_base[None, :] + b_middle
            b_other_score = tl.load(p_scores + o_middle, mask=m_open, other=0).to(tl.int64) + b_bias[None, :]
            b_other_depth = tl.load(p_depths + o_middle, mask=m_open, other=0)
            is_before = o_r[None, :] + tl.zeros([BLOCK, BLOCK_R], dtype=tl.int32) < i_request
            for i_word in tl.static_range(WORDS):
                # From the last word to the first, which decides.
                o_word = (WORDS - 1 - i_word) * s_word
                b_path = tl.load(p_paths + o_word + o_own, mask=m_n, other=0)[:, None]
                b_other = tl.load(p_paths + o_word + o_middle, mask=m_open, other=0)
                is_before = (b_other < b_path) | ((b_other == b_path) & is_before)
            is_equal = b_other_depth == b_depth[:, None]
            is_before = (b_other_depth < b_depth[:, None]) | (is_equal & is_before)
            is_equal = b_other_score == b_score[:, None]
            is_before = (b_other_score > b_score[:, None]) | (is_equal & is_before)
            b_low = tl.where(m_open & is_before, b_middle + 1, b_low)
            b_high = tl.where(m_open & (is_before == 0), b_middle, b_high)
        b_before += tl.sum(tl.where(m_r[None, :], b_low - 1, 0), 1)
    m_own = o_n < N
    tl.store(p_order + o_own, tl.where(m_n, b_before, _NEVER), mask=m_own)
    if has_cost > 0:
        b_index = (-tl.minimum(b_score, 0)) >> 8
        b_index = tl.minimum(b_index, table_len - 1)
        m_value = m_n & (b_before < num_values)
        b_value = tl.load(p_value_table + b_index, mask=m_value, other=0)
        tl.store(p_values + b_before, b_value, mask=m_value)


@triton.jit(do_not_specialize=["N", "num_requests", "num_rows", "num_steps", "has_cost"])
def cut_kernel(
    p_grown, p_order, p_values, p_budget, p_cost, p_counts, p_row_start,
    N, num_requests, num_rows, num_steps, has_cost, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: how many nodes of the order are kept, and what each request has of them."""
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < num_requests
    # [BLOCK_R]
    b_grown = tl.load(p_grown + o_r, mask=m_r, other=0)
    b_root = (b_grown > 0).to(tl.int32)
    num_roots = tl.sum(b_root, 0)
    budget = tl.minimum(tl.load(p_budget), num_rows)
    num_kept = tl.maximum(tl.minimum(budget - num_roots, tl.sum(b_grown, 0) - num_roots), 0)
    if has_cost > 0:
        # [BLOCK]: entry n is a step with n nodes behind the roots.
        o_n = tl.arange(0, BLOCK)
        m_n = o_n <= num_kept
        b_value = tl.load(p_values + o_n - 1, mask=m_n & (o_n > 0), other=0)
        b_tokens = tl.cumsum(b_value, 0) + num_roots.to(tl.int64) * _VALUE_UNIT
        b_cost = tl.load(p_cost + num_roots + o_n, mask=m_n, other=1)
        # From one prefix to a better one, as long as there is any (Dinkelbach): compared with the last one's ratio by
        # products, the gain of the best prefix is zero at the end.
        best = num_roots * 0
        is_open = num_roots > 0
        while is_open:
            tokens = tl.sum(tl.where(o_n == best, b_tokens, 0), 0)
            cost = tl.sum(tl.where(o_n == best, b_cost, 0), 0)
            b_gain = tl.where(m_n, b_tokens * cost - tokens * b_cost, -1)
            gain = tl.max(b_gain, 0)
            best = tl.min(tl.where(b_gain == gain, o_n, BLOCK), 0)
            is_open = gain > 0
        num_kept = best
    # [BLOCK_R]: nodes of one request are in order.
    b_low = tl.full([BLOCK_R], 1, dtype=tl.int32)
    b_high = tl.maximum(b_grown, 1)
    for _ in range(num_steps):
        m_open = m_r & (b_low < b_high)
        b_middle = (b_low + b_high) // 2
        b_place = tl.load(p_order + o_r.to(tl.int64) * N + b_middle, mask=m_open, other=0)
        b_low = tl.where(m_open & (b_place < num_kept), b_middle + 1, b_low)
        b_high = tl.where(m_open & (b_place >= num_kept), b_middle, b_high)
    b_count = tl.where(b_grown > 0, b_low, 0)
    b_end = tl.cumsum(b_count, 0)
    tl.store(p_counts + o_r, b_count, mask=m_r)
    tl.store(p_row_start + o_r, b_end - b_count, mask=m_r)
    tl.store(p_row_start + num_requests, tl.sum(b_count, 0))


@triton.jit(
    do_not_specialize=[
        "N", "num_requests", "num_rows", "num_tiles", "num_words", "s_page_table", "page_size", "pad_slot", "tile_rows",
    ]
)  # fmt: skip
def lay_out_rows_kernel(
    p_tokens, p_parents, p_depths, p_counts, p_row_start, p_context, p_page_table,
    p_row_tokens, p_positions, p_slots, p_bits, p_requests, p_tiles,
    N, num_requests, num_rows, num_tiles, num_words, s_page_table, page_size, pad_slot, tile_rows,
    BLOCK_WORDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (request, block of nodes): their rows. Programs behind the last request clear the rows and tiles that
    nobody has."""
    i_request, i_block = tl.program_id(0), tl.program_id(1)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    o_words = tl.arange(0, BLOCK_WORDS)
    m_words = o_words < num_words
    o_r = tl.arange(0, BLOCK_R)
    # [BLOCK_R]
    b_counts = tl.load(p_counts + o_r, mask=o_r < num_requests, other=0)
    b_tiles = (b_counts + tile_rows - 1) // tile_rows
    first_tile = tl.sum(tl.where(o_r < i_request, b_tiles, 0), 0)
    if i_request == num_requests:
        first = tl.load(p_row_start + num_requests)
        for start in range(first + i_block * BLOCK, num_rows, tl.num_programs(1) * BLOCK):
            o_row = (start + tl.arange(0, BLOCK)).to(tl.int64)
            m_row = o_row < num_rows
            b_zero = tl.zeros([BLOCK], dtype=tl.int64)
            tl.store(p_row_tokens + o_row, b_zero, mask=m_row)
            tl.store(p_positions + o_row, b_zero, mask=m_row)
            tl.store(p_slots + o_row, b_zero + pad_slot, mask=m_row)
            b_none = tl.zeros([BLOCK, BLOCK_WORDS], dtype=tl.int32)
            p_none = p_bits + o_row[:, None] * num_words + o_words[None, :]
            tl.store(p_none, b_none, mask=m_row[:, None] & m_words[None, :])
        for start in range(first_tile + i_block * BLOCK, num_tiles, tl.num_programs(1) * BLOCK):
            o_tile = start + tl.arange(0, BLOCK)
            m_tile = o_tile < num_tiles
            tl.store(p_tiles + o_tile * 2, tl.full([BLOCK], -1, dtype=tl.int32), mask=m_tile)
            tl.store(p_tiles + o_tile * 2 + 1, tl.full([BLOCK], -1, dtype=tl.int32), mask=m_tile)
        return
    o_first = i_request.to(tl.int64) * N
    count = tl.load(p_counts + i_request)
    row_start = tl.load(p_row_start + i_request)
    context = tl.load(p_context + i_request)
    m_n = o_n < count
    # [BLOCK]
    o_row = row_start.to(tl.int64) + o_n
    b_token = tl.load(p_tokens + o_first + o_n, mask=m_n, other=0)
    b_depth = tl.load(p_depths + o_first + o_n, mask=m_n, other=0)
    o_index = context + o_n
    b_page = tl.load(p_page_table + i_request.to(tl.int64) * s_page_table + o_index // page_size, mask=m_n, other=0)
    tl.store(p_row_tokens + o_row, b_token.to(tl.int64), mask=m_n)
    tl.store(p_positions + o_row, (context + b_depth).to(tl.int64), mask=m_n)
    tl.store(p_slots + o_row, b_page.to(tl.int64) * page_size + o_index % page_size, mask=m_n)
    # [BLOCK, BLOCK_WORDS]
    b_bits = tl.zeros([BLOCK, BLOCK_WORDS], dtype=tl.int32)
    b_node = tl.where(m_n, o_n, -1)
    while tl.max(b_node, 0) >= 0:
        m_walk = b_node >= 0
        b_bit = tl.where(m_walk, 1 << (tl.maximum(b_node, 0) % 32), 0)
        b_bits |= tl.where((b_node // 32)[:, None] == o_words[None, :], b_bit[:, None], 0)
        b_node = tl.load(p_parents + o_first + b_node, mask=m_walk, other=-1)
    p_row_bits = p_bits + o_row[:, None] * num_words + o_words[None, :]
    tl.store(p_row_bits, b_bits, mask=m_n[:, None] & m_words[None, :])
    m_tile = m_n & (o_n % tile_rows == 0)
    o_tile = first_tile + o_n // tile_rows
    tl.store(p_tiles + o_tile * 2, i_request + tl.zeros([BLOCK], dtype=tl.int32), mask=m_tile)
    tl.store(p_tiles + o_tile * 2 + 1, o_n, mask=m_tile)
    if i_block == 0:
        tl.store(p_requests + i_request * 4, row_start)
        tl.store(p_requests + i_request * 4 + 1, count)
        tl.store(p_requests + i_request * 4 + 2, context)
        tl.store(p_requests + i_request * 4 + 3, 0)


def build_tree_triton(candidates: Candidates, limits: TreeLimits, out: TreeBuffers) -> None:
    """See `jetflow_kernels.build_tree.build_tree`."""
    num_requests, num_depths, width = candidates.ids.shape
    num_parents, num_nodes = candidates.scores.shape[2], out.num_nodes
    if not num_requests:
        out.row_start.zero_()
        return
    num_sibling_rows = num_requests * num_depths * num_parents
    order_siblings_kernel[(triton.cdiv(num_sibling_rows, BLOCK_SIBLINGS),)](
        candidates.scores, limits.requests, out.siblings, num_sibling_rows, num_depths * num_parents, width,
        BLOCK_W=MAX_WIDTH, BLOCK=BLOCK_SIBLINGS, num_warps=4,
    )  # fmt: skip
    block_n = size_class(num_nodes, TREE_BLOCKS)
    grow_kernel[(num_requests,)](
        candidates.ids, out.siblings, limits.anchor_ids, limits.requests,
        out.token_ids, out.parents, out.depths, out.scores, out.ranks, out.grown,
        num_nodes, num_depths, num_parents, width, BLOCK_N=block_n, num_warps=_grow_warps(block_n),
    )  # fmt: skip
    num_words, s_word = out.paths.shape[0], out.paths.stride(0)
    block = _order_block(num_words)
    grid = (num_requests, triton.cdiv(num_nodes, block))
    trace_paths_kernel[grid](
        out.parents, out.depths, out.ranks, out.grown, out.paths, num_nodes, s_word,
        WORDS=num_words, BLOCK=block, num_warps=1,
    )  # fmt: skip
    has_cost = limits.cost is not None
    value_table = limits.value_table if limits.value_table is not None else out.values
    steps = num_nodes.bit_length()
    order_nodes_kernel[grid](
        out.scores, out.depths, out.paths, out.grown, limits.requests, value_table, out.order, out.values,
        num_nodes, num_requests, s_word, value_table.shape[0], out.values.shape[0], steps, int(has_cost),
        WORDS=num_words, BLOCK=block, BLOCK_R=_search_block(num_requests), num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    cut_kernel[(1,)](
        out.grown, out.order, out.values, limits.budget, limits.cost if has_cost else out.values,
        out.counts, out.row_start, num_nodes, num_requests, out.num_rows, steps, int(has_cost),
        BLOCK_R=size_class(num_requests, BATCH_BLOCKS), BLOCK=size_class(out.num_rows, CUT_BLOCKS),
        num_warps=8, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def lay_out_rows_triton(
    trees: TreeBuffers,
    out: RowLayout,
    *,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    pad_slot: int,
    tile_rows: int,
) -> None:
    """See `jetflow_kernels.build_tree.lay_out_rows`."""
    num_words = out.ancestor_bits.shape[1]
    lay_out_rows_kernel[(trees.num_requests + 1, triton.cdiv(trees.num_nodes, BLOCK_ROWS))](
        trees.token_ids, trees.parents, trees.depths, trees.counts, trees.row_start, context_lens, page_table,
        out.token_ids, out.positions, out.slot_mapping, out.ancestor_bits, out.requests, out.tiles,
        trees.num_nodes, trees.num_requests, out.token_ids.shape[0], out.tiles.shape[0], num_words,
        page_table.stride(0), page_size, pad_slot, tile_rows,
        BLOCK_WORDS=size_class(num_words, WORD_BLOCKS), BLOCK_R=size_class(trees.num_requests, BATCH_BLOCKS),
        BLOCK=BLOCK_ROWS, num_warps=4,
    )  # fmt: skip


def launch_each_variant(device: torch.device) -> None:
    """Every kernel of this op, over trees that nobody has."""
    wide, deep = (MAX_NODES, 2 * CUT_BLOCKS[0], MAX_DEPTH), (1, CUT_BLOCKS[0], 1)
    for num_requests, (num_nodes, num_rows, num_depths) in (
        (SEARCH_BLOCKS[0], wide), (BATCH_BLOCKS[0] + 1, wide), (SEARCH_BLOCKS[0], deep), (BATCH_BLOCKS[0] + 1, deep),
        (1, (TREE_BLOCKS[1], 1, 1)),
    ):  # fmt: skip
        _launch_over_nobody(num_requests, num_nodes, num_rows, num_depths, device)


def _launch_over_nobody(
    num_requests: int, num_nodes: int, num_rows: int, num_depths: int, device: torch.device
) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    trees = TreeBuffers.allocate(
        num_requests=num_requests, num_nodes=num_nodes, num_rows=num_rows, num_depths=num_depths, width=1,
        is_conditional=False, device=device,
    )  # fmt: skip
    candidates = Candidates(
        ids=zeros(num_requests, num_depths, 1, dtype=torch.int64), scores=zeros(num_requests, num_depths, 1, 1)
    )
    limits = TreeLimits(
        anchor_ids=zeros(num_requests, dtype=torch.int64), requests=zeros(num_requests, 4), budget=zeros(1)
    )
    build_tree_triton(candidates, limits, trees)
    rows = RowLayout.allocate(
        num_requests=num_requests, num_nodes=num_nodes, num_rows=num_rows, tile_rows=1, device=device
    )
    lay_out_rows_triton(
        trees, rows, context_lens=zeros(num_requests), page_table=zeros(num_requests, 1), page_size=1, pad_slot=0,
        tile_rows=1,
    )  # fmt: skip


def _search_block(num_requests: int) -> int:
    """Requests in which a program searches at a time."""
    return SEARCH_BLOCKS[0] if num_requests <= SEARCH_BLOCKS[0] else SEARCH_BLOCKS[1]


def _order_block(num_words: int) -> int:
    """Nodes of a program that compares paths of so many words: what its registers hold."""
    return BLOCK_NODES if num_words <= 2 else BLOCK_NODES // 2


def _grow_warps(num_nodes: int) -> int:
    """One warp reduces without a barrier; a large tree's nodes do not fit its registers."""
    return 1 if num_nodes <= 128 else 4


def shipped_configurations() -> list[KernelConfiguration]:
    """Every class of sizes: these are all kernels that a launch can ask for."""
    found = [_configuration("siblings", order_siblings_kernel, {}, {"BLOCK_W": MAX_WIDTH, "BLOCK": BLOCK_SIBLINGS}, 4)]
    found += [_grow(num_nodes) for num_nodes in TREE_BLOCKS]
    for words in WORDS_OF_PATHS:
        found += _paths(words)
    found += [_cut(requests, rows) for requests in BATCH_BLOCKS for rows in CUT_BLOCKS]
    found += [_rows(words, requests) for words in WORD_BLOCKS for requests in BATCH_BLOCKS]
    return found


def _configuration(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    max_registers: int | None = None,
) -> KernelConfiguration:
    """Arguments without a type are int32."""
    types = {n: types.get(n, "*i32" if n.startswith("p_") else "i32") for n in kernel.arg_names if n not in constants}
    return KernelConfiguration(
        name=f"build_tree_{name}",
        kernel=kernel,
        types=types,
        constants=constants,
        multiples_of_16=frozenset(n for n in types if n.startswith("p_")),
        num_warps=num_warps,
        num_stages=3,
        max_registers=max_registers,
    )


def _grow(num_nodes: int) -> KernelConfiguration:
    types = {"p_ids": "*i64", "p_anchors": "*i64"}
    return _configuration(f"grow-n{num_nodes}", grow_kernel, types, {"BLOCK_N": num_nodes}, _grow_warps(num_nodes))


def _paths(words: int) -> list[KernelConfiguration]:
    types = {"p_paths": "*i64", "p_value_table": "*i64", "p_values": "*i64"}
    constants = {"WORDS": words, "BLOCK": _order_block(words)}
    return [_configuration(f"paths-w{words}", trace_paths_kernel, types, constants, 1)] + [
        _configuration(
            f"order-w{words}-r{block}", order_nodes_kernel, types, constants | {"BLOCK_R": block}, 4, MAX_REGISTERS
        )
        for block in SEARCH_BLOCKS
    ]


def _cut(num_requests: int, num_rows: int) -> KernelConfiguration:
    types = {"p_values": "*i64", "p_cost": "*i64"}
    constants = {"BLOCK_R": num_requests, "BLOCK": num_rows}
    return _configuration(f"cut-r{num_requests}-b{num_rows}", cut_kernel, types, constants, 8, MAX_REGISTERS)


def _rows(words: int, num_requests: int) -> KernelConfiguration:
    types = dict.fromkeys(("p_row_tokens", "p_positions", "p_slots"), "*i64")
    constants = {"BLOCK_WORDS": words, "BLOCK_R": num_requests, "BLOCK": BLOCK_ROWS}
    return _configuration(f"rows-w{words}-r{num_requests}", lay_out_rows_kernel, types, constants, 4)
