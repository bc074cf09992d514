"""The Triton kernels. Plain greedy: the best token of every row, then one walk. Else level by level, on the reached
rows alone: scores, changes to few tokens, filters, draw, step."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from jetflow_kernels.accept_tree.buffers import CHUNK, SamplingTable, VerifiedTrees, WalkBuffers
from jetflow_kernels.aot import KernelConfiguration
from jetflow_kernels.philox_gumbel.kernel import gumbel
from jetflow_kernels.shipped import size_class

#: Scores and changed tokens that one pass of a program takes.
BLOCK_FILTER, BLOCK_CHANGED = 2048, 256
#: Sizes that code is compiled for; a batch takes the smallest that holds it.
TREE_BLOCKS, CHUNK_BLOCKS, PATH_BLOCKS, BATCH_BLOCKS = (32, 128, 512), (256,), (128,), (512,)
_NOBODY = tl.constexpr(2**31 - 1)
#: All that a thread can have.
MAX_REGISTERS = 255
#: A product and a sum that were fused would differ from the CPU's.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "maxnreg": MAX_REGISTERS}


@triton.jit
def _load_scores(p_logits, m):
    """Logits in fp64; what is not a number counts as infinite."""
    b_logits = tl.load(p_logits, mask=m, other=0.0)
    if p_logits.dtype.element_ty != tl.float64:
        b_logits = b_logits.to(tl.float32)
    b_scores = b_logits.to(tl.float64)
    return tl.where(b_scores == b_scores, b_scores, float("inf"))


@triton.jit
def _store_best(p_best, p_ids, o_out, b_scores, o_v, m_v):
    """The best score and the first token that has it."""
    best = tl.max(tl.where(m_v, b_scores, float("-inf")), 0)
    first = tl.min(tl.where(m_v & (b_scores == best), o_v, _NOBODY), 0)
    tl.store(p_best + o_out, best)
    tl.store(p_ids + o_out, first)


@triton.jit
def _best_of_chunks(p_best, p_ids, i_row, num_chunks, BLOCK_C: tl.constexpr):
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < num_chunks
    # [BLOCK_C]
    b_best = tl.load(p_best + i_row.to(tl.int64) * num_chunks + o_c, mask=m_c, other=float("-inf"))
    b_ids = tl.load(p_ids + i_row.to(tl.int64) * num_chunks + o_c, mask=m_c, other=_NOBODY)
    return tl.min(tl.where(b_best == tl.max(b_best, 0), b_ids, _NOBODY), 0)


@triton.jit
def _first_child(p_tokens, p_parents, i_request, node, token, count, N, BLOCK_N: tl.constexpr):
    """The first child of a node that carries a token; a large number where there is none."""
    o_n = tl.arange(0, BLOCK_N)
    m_n = (o_n > 0) & (o_n < count)
    # [BLOCK_N]
    b_parents = tl.load(p_parents + i_request.to(tl.int64) * N + o_n, mask=m_n, other=-1)
    b_tokens = tl.load(p_tokens + i_request.to(tl.int64) * N + o_n, mask=m_n, other=-1)
    return tl.min(tl.where(m_n & (b_parents == node) & (b_tokens == token), o_n, _NOBODY), 0)


@triton.jit
def best_tokens_kernel(p_logits, p_best, p_ids, V, s_row, num_chunks, CHUNK: tl.constexpr):
    """Program (row, chunk): the chunk's best token."""
    i_row, i_chunk = tl.program_id(0), tl.program_id(1)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    m_v = o_v < V
    # [CHUNK]
    b_scores = _load_scores(p_logits + i_row.to(tl.int64) * s_row + o_v, m_v)
    _store_best(p_best, p_ids, i_row.to(tl.int64) * num_chunks + i_chunk, b_scores, o_v, m_v)


@triton.jit(do_not_specialize=["N", "L", "num_chunks"])
def walk_best_kernel(
    p_tokens, p_parents, p_counts, p_first_rows, p_best, p_ids, p_nodes, p_path, p_lengths, p_walking,
    N, L, num_chunks, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (request): the walk along the best tokens."""
    i_request = tl.program_id(0)
    count = tl.load(p_counts + i_request)
    first_row = tl.load(p_first_rows + i_request)
    o_path = i_request.to(tl.int64) * L
    tl.store(p_walking + i_request, 0)
    length = count * 0
    node = tl.where(count > 0, 0, _NOBODY)
    while (node < count) & (length < L):
        token = _best_of_chunks(p_best, p_ids, first_row + node, num_chunks, BLOCK_C)
        tl.store(p_nodes + o_path + length, node)
        tl.store(p_path + o_path + length, token)
        length += 1
        node = _first_child(p_tokens, p_parents, i_request, node, token, count, N, BLOCK_N)
    tl.store(p_lengths + i_request, length)


@triton.jit(do_not_specialize=["L", "num_requests"])
def start_kernel(p_counts, p_nodes, p_lengths, p_walking, L, num_requests, BLOCK_R: tl.constexpr):
    """One program: every walk is at its root."""
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < num_requests
    # [BLOCK_R]
    b_counts = tl.load(p_counts + o_r, mask=m_r, other=0)
    tl.store(p_nodes + o_r.to(tl.int64) * L, b_counts * 0, mask=m_r)
    tl.store(p_lengths + o_r, b_counts * 0, mask=m_r)
    tl.store(p_walking + o_r, (b_counts > 0).to(tl.int32), mask=m_r)


@triton.jit(do_not_specialize=["L"])
def scores_kernel(
    p_logits, p_first_rows, p_nodes, p_lengths, p_walking, p_factors, p_scores, V, L, s_row, CHUNK: tl.constexpr
):  # fmt: skip
    """Program (request, chunk): logits of the reached node over the temperature."""
    i_request, i_chunk = tl.program_id(0), tl.program_id(1)
    if tl.load(p_walking + i_request) == 0:
        return
    node = tl.load(p_nodes + i_request.to(tl.int64) * L + tl.load(p_lengths + i_request))
    row = (tl.load(p_first_rows + i_request) + node).to(tl.int64)
    temperature = tl.load(p_factors + i_request * 6)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    m_v = o_v < V
    # [CHUNK]
    b_scores = _load_scores(p_logits + row * s_row + o_v, m_v)
    b_scores = b_scores / tl.where(temperature > 0, temperature, 1.0)
    tl.store(p_scores + i_request.to(tl.int64) * V + o_v, b_scores, mask=m_v)


@triton.jit
def _changed(p_logits, b_ids, b_counts, b_bias, p_factors, m):
    """Scores of tokens behind penalties, bias and temperature; a count below 0 means that there is no penalty."""
    repetition, presence, frequency = tl.load(p_factors + 3), tl.load(p_factors + 4), tl.load(p_factors + 5)
    temperature = tl.load(p_factors)
    b_scores = _load_scores(p_logits + b_ids, m)
    b_penalised = tl.where(b_scores > 0, b_scores / repetition, b_scores * repetition)
    b_present = tl.where(b_counts > 0, presence, 0.0)
    b_penalised = b_penalised - (b_present + frequency * b_counts.to(tl.float64))
    b_scores = tl.where(b_counts >= 0, b_penalised, b_scores) + b_bias
    return b_scores / tl.where(temperature > 0, temperature, 1.0)


@triton.jit(do_not_specialize=["L", "num_changed_places", "num_barred_places"])
def changes_kernel(
    p_logits, p_first_rows, p_nodes, p_path, p_lengths, p_walking, p_numbers, p_factors,
    p_changed_ids, p_changed_counts, p_changed_bias, p_barred, p_scores,
    V, L, s_row, num_changed_places, num_barred_places, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Program (request): the few tokens of the reached row that are not taken as they are."""
    i_request = tl.program_id(0)
    if tl.load(p_walking + i_request) == 0:
        return
    length = tl.load(p_lengths + i_request)
    o_path = i_request.to(tl.int64) * L
    row = (tl.load(p_first_rows + i_request) + tl.load(p_nodes + o_path + length)).to(tl.int64)
    p_row = p_logits + row * s_row
    p_out = p_scores + i_request.to(tl.int64) * V
    p_request = p_factors + i_request * 6
    repetition, presence = tl.load(p_request + 3), tl.load(p_request + 4)
    has_penalties = (repetition != 1.0) | (presence != 0.0) | (tl.load(p_request + 5) != 0.0)
    if has_penalties & (length > 0):
        # Tokens of the path, as if they were new; those that are not are written again below.
        o_l = tl.arange(0, BLOCK_L)
        m_l = o_l < length
        # [BLOCK_L]
        b_ids = tl.load(p_path + o_path + o_l, mask=m_l, other=-1)
        b_counts = tl.zeros([BLOCK_L], dtype=tl.int32)
        for i in range(length):
            b_counts += (b_ids == tl.load(p_path + o_path + i)).to(tl.int32)
        b_scores = _changed(p_row, b_ids, b_counts, tl.zeros([BLOCK_L], dtype=tl.float64), p_request, m_l)
        tl.store(p_out + b_ids, b_scores, mask=m_l)
    tl.debug_barrier()
    num_changed = tl.load(p_numbers + i_request * 5 + 4).to(tl.int32)
    o_first = i_request.to(tl.int64) * num_changed_places
    for start in range(0, num_changed, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m_c = o_c < num_changed
        # [BLOCK]
        b_ids = tl.load(p_changed_ids + o_first + o_c, mask=m_c, other=-1)
        b_counts = tl.load(p_changed_counts + o_first + o_c, mask=m_c, other=-1)
        b_bias = tl.load(p_changed_bias + o_first + o_c, mask=m_c, other=0.0)
        for i in range(length):
            is_here = b_ids == tl.load(p_path + o_path + i)
            b_counts = tl.where(is_here, tl.maximum(b_counts, 0) + 1, b_counts)
        b_counts = tl.where(has_penalties, b_counts, -1)
        tl.store(p_out + b_ids, _changed(p_row, b_ids, b_counts, b_bias, p_request, m_c), mask=m_c)
    tl.debug_barrier()
    if length < tl.load(p_numbers + i_request * 5 + 3):
        for start in range(0, num_barred_places, BLOCK):
            o_b = start + tl.arange(0, BLOCK)
            # [BLOCK]
            b_ids = tl.load(p_barred + i_request * num_barred_places + o_b, mask=o_b < num_barred_places, other=-1)
            b_never = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
            tl.store(p_out + b_ids, b_never, mask=(b_ids >= 0) & (b_ids < V))


@triton.jit
def _select(p_row, p_list, V, low, top, needed, IS_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The least score v for which the scores above it weigh less than `needed`, and what these weigh; a score weighs 1,
    or its share of the mass. Halves the range of candidates, which begin at `low`, until one value is left."""
    o = tl.arange(0, BLOCK)
    high = top
    above = top * 0.0
    num = V
    p_from = p_row
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)
        b_weight = tl.zeros([BLOCK], dtype=tl.float64)
        b_highest = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
        b_lowest = tl.full([BLOCK], float("inf"), dtype=tl.float64)
        for start in range(0, num, BLOCK):
            # [BLOCK]
            b_score = tl.load(p_from + start + o, mask=start + o < num, other=float("-inf"))
            m_upper = (b_score > middle) & (b_score <= high)
            m_lower = (b_score >= low) & (b_score <= middle)
            if IS_MASS:
                b_weight += tl.where(m_upper, tl.exp(tl.where(m_upper, b_score - top, 0.0)), 0.0)
            else:
                b_weight += m_upper.to(tl.float64)
            b_highest = tl.maximum(b_highest, tl.where(m_lower, b_score, float("-inf")))
            b_lowest = tl.minimum(b_lowest, tl.where(m_upper, b_score, float("inf")))
        weight = above + tl.sum(b_weight, 0)
        is_lower = weight < needed
        above = tl.where(is_lower, weight, above)
        high = tl.where(is_lower, tl.max(b_highest, 0), high)
        low = tl.where(is_lower, low, tl.min(b_lowest, 0))
        if num > BLOCK:
            # Later passes read what is left in the range, in the old order.
            num_left = num * 0
            for start in range(0, num, BLOCK):
                # [BLOCK]
                b_score = tl.load(p_from + start + o, mask=start + o < num, other=float("-inf"))
                m_left = (b_score >= low) & (b_score <= high)
                b_place = tl.cumsum(m_left.to(tl.int32), 0)
                tl.debug_barrier()
                tl.store(p_list + num_left + b_place - 1, b_score, mask=m_left)
                num_left += tl.sum(m_left.to(tl.int32), 0)
            tl.debug_barrier()
            num = num_left
            p_from = p_list
    return low, above


@triton.jit
def filters_kernel(
    p_scores, p_lists, p_numbers, p_factors, p_walking, p_cut, p_cut_id, V, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (request): the least score that top-k, top-p and min-p keep, and the last token of that score."""
    i_request = tl.program_id(0)
    if tl.load(p_walking + i_request) == 0:
        return
    top_k = tl.load(p_numbers + i_request * 5 + 2)
    temperature, top_p = tl.load(p_factors + i_request * 6), tl.load(p_factors + i_request * 6 + 1)
    log_min_p = tl.load(p_factors + i_request * 6 + 2)
    has_k, has_p = (top_k > 0) & (top_k < V), top_p < 1.0
    p_row = p_scores + i_request.to(tl.int64) * V
    p_list = p_lists + i_request.to(tl.int64) * V
    tl.store(p_cut + i_request, float("-inf"))
    tl.store(p_cut_id + i_request, V)
    if (temperature == 0.0) | ((has_k == 0) & (has_p == 0) & (log_min_p == float("-inf"))):
        return
    o = tl.arange(0, BLOCK)
    b_top = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
    b_least = tl.full([BLOCK], float("inf"), dtype=tl.float64)
    for start in range(0, V, BLOCK):
        # [BLOCK]
        b_score = tl.load(p_row + start + o, mask=start + o < V, other=float("-inf"))
        b_top = tl.maximum(b_top, b_score)
        b_least = tl.minimum(b_least, tl.where(b_score > float("-inf"), b_score, float("inf")))
    top = tl.max(b_top, 0)
    low = tl.min(b_least, 0)
    if low > top:
        # Nothing is possible.
        return
    num_tied = V.to(tl.float64)
    cut = low
    if has_k:
        cut, num_above = _select(p_row, p_list, V, low, top, top_k.to(tl.float64), False, BLOCK)
        num_tied = top_k.to(tl.float64) - num_above
    if has_p:
        b_mass = tl.zeros([BLOCK], dtype=tl.float64)
        b_tied = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, V, BLOCK):
            # [BLOCK]
            b_score = tl.load(p_row + start + o, mask=start + o < V, other=float("-inf"))
            b_mass += tl.where(b_score > cut, tl.exp(tl.where(b_score > cut, b_score - top, 0.0)), 0.0)
            b_tied += (b_score == cut).to(tl.float64)
        tied = tl.minimum(tl.sum(b_tied, 0), num_tied) * tl.exp(cut - top)
        needed = top_p * (tl.sum(b_mass, 0) + tied)
        nucleus, above = _select(p_row, p_list, V, cut, top, needed, True, BLOCK)
        weight = tl.exp(nucleus - top)
        num_nucleus = tl.ceil((needed - above) / tl.where(weight > 0.0, weight, 1.0))
        num_nucleus = tl.where(weight > 0.0, tl.maximum(num_nucleus, 1.0), V.to(tl.float64))
        num_tied = tl.where(nucleus > cut, num_nucleus, tl.minimum(num_tied, num_nucleus))
        cut = nucleus
    # The last of the tied tokens that are kept.
    last = V + 0
    num_seen = top * 0.0
    for start in range(0, V, BLOCK):
        # [BLOCK]
        b_score = tl.load(p_row + start + o, mask=start + o < V, other=float("-inf"))
        b_seen = num_seen + tl.cumsum((b_score == cut).to(tl.int32), 0).to(tl.float64)
        m_last = (b_score == cut) & (b_seen == num_tied)
        last = tl.minimum(last, tl.min(tl.where(m_last, start + o, V), 0))
        num_seen += tl.sum((b_score == cut).to(tl.float64), 0)
    least = log_min_p + top
    last = tl.where(least > cut, V, last)
    tl.store(p_cut + i_request, tl.maximum(cut, least))
    tl.store(p_cut_id + i_request, last)


@triton.jit(do_not_specialize=["L", "num_chunks", "has_filters"])
def draw_kernel(
    p_logits, p_first_rows, p_nodes, p_lengths, p_walking, p_numbers, p_factors, p_cut, p_cut_id,
    p_best, p_ids, V, L, s_row, num_chunks, has_filters, IS_PROCESSED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (request, chunk): the chunk's best token behind noise. The logits are those of all rows, or the scores of
    the reached ones, processed already."""
    i_request, i_chunk = tl.program_id(0), tl.program_id(1)
    if tl.load(p_walking + i_request) == 0:
        return
    length = tl.load(p_lengths + i_request)
    temperature = tl.load(p_factors + i_request * 6)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    m_v = o_v < V
    # [CHUNK]
    if IS_PROCESSED:
        b_scores = tl.load(p_logits + i_request.to(tl.int64) * s_row + o_v, mask=m_v, other=float("-inf"))
    else:
        node = tl.load(p_nodes + i_request.to(tl.int64) * L + length)
        row = (tl.load(p_first_rows + i_request) + node).to(tl.int64)
        b_scores = _load_scores(p_logits + row * s_row + o_v, m_v)
        b_scores = b_scores / tl.where(temperature > 0, temperature, 1.0)
    if has_filters > 0:
        cut = tl.load(p_cut + i_request)
        is_kept = (b_scores > cut) | ((b_scores == cut) & (o_v <= tl.load(p_cut_id + i_request)))
        b_scores = tl.where(is_kept, b_scores, float("-inf"))
    if temperature > 0.0:
        position = tl.load(p_numbers + i_request * 5 + 1) + length
        b_scores += gumbel(position, o_v, tl.load(p_numbers + i_request * 5))
    _store_best(p_best, p_ids, i_request.to(tl.int64) * num_chunks + i_chunk, b_scores, o_v, m_v)


@triton.jit(do_not_specialize=["N", "L", "num_chunks"])
def step_kernel(
    p_tokens, p_parents, p_counts, p_best, p_ids, p_nodes, p_path, p_lengths, p_walking,
    N, L, num_chunks, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (request): the token of the reached node, and the child that carries it."""
    i_request = tl.program_id(0)
    if tl.load(p_walking + i_request) == 0:
        return
    o_path = i_request.to(tl.int64) * L
    length = tl.load(p_lengths + i_request)
    node = tl.load(p_nodes + o_path + length)
    token = _best_of_chunks(p_best, p_ids, i_request, num_chunks, BLOCK_C)
    child = _first_child(p_tokens, p_parents, i_request, node, token, tl.load(p_counts + i_request), N, BLOCK_N)
    goes_on = (child < N) & (length + 1 < L)
    tl.store(p_path + o_path + length, token)
    tl.store(p_nodes + o_path + length + 1, child, mask=goes_on)
    tl.store(p_lengths + i_request, length + 1)
    tl.store(p_walking + i_request, goes_on.to(tl.int32))


@triton.jit(do_not_specialize=["L", "s_page_table", "page_size"])
def commit_slots_kernel(
    p_nodes, p_lengths, p_context, p_page_table, p_source, p_target, L, s_page_table, page_size, BLOCK_L: tl.constexpr
):  # fmt: skip
    """Program (request): slots of accepted nodes that are not in their place."""
    i_request = tl.program_id(0)
    o_l = tl.arange(0, BLOCK_L)
    context = tl.load(p_context + i_request)
    o_path = i_request.to(tl.int64) * L
    m_l = o_l < tl.load(p_lengths + i_request)
    # [BLOCK_L]
    b_nodes = tl.load(p_nodes + o_path + o_l, mask=m_l, other=0)
    m_l = m_l & (b_nodes != o_l)
    p_table = p_page_table + i_request.to(tl.int64) * s_page_table
    o_source, o_target = context + b_nodes, context + o_l
    b_source = tl.load(p_table + o_source // page_size, mask=m_l, other=0).to(tl.int64)
    b_target = tl.load(p_table + o_target // page_size, mask=m_l, other=0).to(tl.int64)
    b_source = tl.where(m_l, b_source * page_size + o_source % page_size, -1)
    b_target = tl.where(m_l, b_target * page_size + o_target % page_size, -1)
    tl.store(p_source + o_path + o_l, b_source, mask=o_l < L)
    tl.store(p_target + o_path + o_l, b_target, mask=o_l < L)


def accept_tree_triton(trees: VerifiedTrees, table: SamplingTable | None, out: WalkBuffers) -> None:
    """See `jetflow_kernels.accept_tree.accept_tree`."""
    (num_requests, num_nodes), (num_rows, vocab_size) = trees.token_ids.shape, trees.logits.shape
    if not num_requests:
        return
    num_levels, num_chunks = out.nodes.shape[1], out.best_scores.shape[1]
    blocks = {"BLOCK_N": size_class(num_nodes, TREE_BLOCKS), "BLOCK_C": size_class(num_chunks, CHUNK_BLOCKS)}
    tree = (trees.token_ids, trees.parents, trees.counts)
    best, walk = (out.best_scores, out.best_ids), (out.nodes, out.token_ids, out.lengths, out.walking)
    s_row = trees.logits.stride(0)
    if table is None:
        best_tokens_kernel[(num_rows, num_chunks)](
            trees.logits, *best, vocab_size, s_row, num_chunks, CHUNK=CHUNK, num_warps=4, **_OPTIONS
        )
        walk_best_kernel[(num_requests,)](
            *tree, trees.first_rows, *best, *walk, num_nodes, num_levels, num_chunks, **blocks, num_warps=4, **_OPTIONS
        )
        return
    start_kernel[(1,)](
        trees.counts, out.nodes, out.lengths, out.walking, num_levels, num_requests,
        BLOCK_R=size_class(num_requests, BATCH_BLOCKS), num_warps=1, **_OPTIONS,
    )  # fmt: skip
    logits = out.scores if table.is_processed else trees.logits
    for _ in range(num_levels):
        _process_reached(trees, table, out)
        draw_kernel[(num_requests, num_chunks)](
            logits, trees.first_rows, out.nodes, out.lengths, out.walking,
            table.numbers, table.factors, out.cut, out.cut_id, *best,
            vocab_size, num_levels, logits.stride(0), num_chunks, int(table.has_filters),
            IS_PROCESSED=table.is_processed, CHUNK=CHUNK, num_warps=4, **_OPTIONS,
        )  # fmt: skip
        step_kernel[(num_requests,)](
            *tree, *best, *walk, num_nodes, num_levels, num_chunks, **blocks, num_warps=4, **_OPTIONS
        )  # fmt: skip


def _process_reached(trees: VerifiedTrees, table: SamplingTable, out: WalkBuffers) -> None:
    """Scores of the rows that the walks have reached, and what filters keep of them."""
    (num_requests, num_levels), vocab_size, s_row = out.nodes.shape, trees.logits.shape[1], trees.logits.stride(0)
    if table.is_processed:
        scores_kernel[(num_requests, out.best_scores.shape[1])](
            trees.logits, trees.first_rows, out.nodes, out.lengths, out.walking, table.factors, out.scores,
            vocab_size, num_levels, s_row, CHUNK=CHUNK, num_warps=4, **_OPTIONS,
        )  # fmt: skip
    if table.has_changes:
        changes_kernel[(num_requests,)](
            trees.logits, trees.first_rows, out.nodes, out.token_ids, out.lengths, out.walking,
            table.numbers, table.factors, table.changed_ids, table.changed_counts, table.changed_bias,
            table.barred_ids, out.scores, vocab_size, num_levels, s_row,
            table.changed_ids.shape[1], table.barred_ids.shape[1],
            BLOCK=BLOCK_CHANGED, BLOCK_L=size_class(num_levels, PATH_BLOCKS), num_warps=4, **_OPTIONS,
        )  # fmt: skip
    if table.has_filters:
        filters_kernel[(num_requests,)](
            out.scores, out.shortlist, table.numbers, table.factors, out.walking, out.cut, out.cut_id,
            vocab_size, BLOCK=BLOCK_FILTER, num_warps=8, **_OPTIONS,
        )  # fmt: skip


def commit_slots_triton(
    out: WalkBuffers,
    source_slots: torch.Tensor,
    target_slots: torch.Tensor,
    *,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
) -> None:
    """See `jetflow_kernels.accept_tree.commit_slots`."""
    num_requests, num_levels = out.nodes.shape
    if num_requests:
        commit_slots_kernel[(num_requests,)](
            out.nodes, out.lengths, context_lens, page_table, source_slots, target_slots,
            num_levels, page_table.stride(0), page_size,
            BLOCK_L=size_class(num_levels, PATH_BLOCKS), num_warps=1, **_OPTIONS,
        )  # fmt: skip


def launch_each_variant(device: torch.device, *, dtype: torch.dtype, vocab_size: int) -> None:
    """Every kernel that walks over logits of this dtype and vocabulary, for requests that are not there."""
    logits = torch.zeros(1, vocab_size, dtype=dtype, device=device)
    first_rows = torch.zeros(1, dtype=torch.int32, device=device)
    for num_nodes in TREE_BLOCKS:
        nodes = torch.zeros(1, num_nodes, dtype=torch.int32, device=device)
        trees = VerifiedTrees(token_ids=nodes, parents=nodes, counts=first_rows, first_rows=first_rows, logits=logits)
        out = WalkBuffers.allocate(
            num_requests=1, num_levels=1, num_rows=1, vocab_size=vocab_size, is_processed=True, device=device
        )
        accept_tree_triton(trees, None, out)
        for is_processed in (False, True):
            table = SamplingTable.allocate(
                num_requests=1, num_changed=0, num_barred=0, has_changes=is_processed, has_filters=is_processed,
                device=device,
            )  # fmt: skip
            accept_tree_triton(trees, table, out)
    slots = torch.zeros(2, 1, 1, dtype=torch.int64, device=device)
    commit_slots_triton(out, slots[0].clone(), slots[1].clone(), context_lens=first_rows, page_table=nodes, page_size=1)


def shipped_configurations() -> list[KernelConfiguration]:
    """Every dtype of logits and class of trees: these are all kernels that a launch can ask for."""
    found = []
    for name in ("bf16", "fp16", "fp32", "fp64"):
        changes = {"BLOCK": BLOCK_CHANGED, "BLOCK_L": PATH_BLOCKS[0]}
        found += [
            _configuration(f"best-{name}", best_tokens_kernel, {"CHUNK": CHUNK}, 4, logits=name),
            _configuration(f"draw-{name}", draw_kernel, {"IS_PROCESSED": False, "CHUNK": CHUNK}, 4, logits=name),
            _configuration(f"scores-{name}", scores_kernel, {"CHUNK": CHUNK}, 4, logits=name),
            _configuration(f"changes-{name}", changes_kernel, changes, 4, logits=name),
        ]
    found.append(_configuration("draw", draw_kernel, {"IS_PROCESSED": True, "CHUNK": CHUNK}, 4, logits="fp64"))
    for num_nodes in TREE_BLOCKS:
        blocks = {"BLOCK_N": num_nodes, "BLOCK_C": CHUNK_BLOCKS[0]}
        found.append(_configuration(f"walk-n{num_nodes}", walk_best_kernel, blocks, 4))
        found.append(_configuration(f"step-n{num_nodes}", step_kernel, blocks, 4))
    found += [
        _configuration("filters", filters_kernel, {"BLOCK": BLOCK_FILTER}, 8),
        _configuration("start", start_kernel, {"BLOCK_R": BATCH_BLOCKS[0]}, 1),
        _configuration("slots", commit_slots_kernel, {"BLOCK_L": PATH_BLOCKS[0]}, 1),
    ]
    return found


def _configuration(
    name: str, kernel: Any, constants: dict[str, Any], num_warps: int, logits: str = "fp32"
) -> KernelConfiguration:
    """Arguments without a type of their own are int32."""
    doubles = ("p_scores", "p_lists", "p_best", "p_cut", "p_factors", "p_changed_bias")
    types = {"p_logits": f"*{logits}"} | dict.fromkeys(doubles, "*fp64")
    types |= dict.fromkeys(("p_numbers", "p_source", "p_target"), "*i64")
    types = {n: types.get(n, "*i32" if n.startswith("p_") else "i32") for n in kernel.arg_names if n not in constants}
    return KernelConfiguration(
        name=f"accept_tree_{name}",
        kernel=kernel,
        types=types,
        constants=constants,
        multiples_of_16=frozenset(n for n in types if n.startswith("p_")),
        num_warps=num_warps,
        num_stages=3,
        max_registers=MAX_REGISTERS,
        fuses_products=False,
    )
