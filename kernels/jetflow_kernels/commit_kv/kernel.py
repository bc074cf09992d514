"""The Triton kernel: one launch for all layers and requests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from jetflow_kernels.aot import KernelConfiguration

#: Moves that a program reads before it writes any, and 4-byte words of each.
BLOCK_M, BLOCK_C = 16, 256
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_moves", "num_slots"], do_not_specialize_on_alignment=["p_source", "p_target"])
def commit_kv_kernel(
    p_kv, p_source, p_target, num_moves, num_slots, slot_words, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Program (columns of a slot, K or V of a layer, request): all moves of the request, in order."""
    i_columns, i_part, i_request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_source += i_request * num_moves
    p_target += i_request * num_moves
    p_part = p_kv + i_part.to(tl.int64) * num_slots * slot_words
    o_c = i_columns * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < slot_words
    for first in range(0, num_moves, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        # int64 [BLOCK_M]
        b_source = tl.load(p_source + o_m, mask=o_m < num_moves, other=-1)
        b_target = tl.load(p_target + o_m, mask=o_m < num_moves, other=-1)
        m_move = ((b_source >= 0) & (b_source != b_target))[:, None] & m_c[None, :]
        # [BLOCK_M, BLOCK_C]
        b_words = tl.load(p_part + b_source[:, None] * slot_words + o_c[None, :], mask=m_move, other=0)
        # No warp may write a slot that another one has yet to read.
        tl.debug_barrier()
        tl.store(p_part + b_target[:, None] * slot_words + o_c[None, :], b_words, mask=m_move)


def commit_kv_triton(kv: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor) -> None:
    """See `jetflow_kernels.commit_kv.commit_kv`."""
    if not source_slots.numel():
        return
    source, target = source_slots.contiguous(), target_slots.contiguous()
    # Bits are moved, whatever they mean.
    words = kv.view(torch.int32)
    num_layers, _, num_pages, page_size, num_kv_heads, head_words = words.shape
    slot_words = num_kv_heads * head_words
    grid = (triton.cdiv(slot_words, BLOCK_C), 2 * num_layers, source.shape[0] if source.dim() > 1 else 1)
    commit_kv_kernel[grid](
        words, source, target, source.shape[-1], num_pages * page_size, slot_words,
        BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C, num_warps=_NUM_WARPS,
    )  # fmt: skip


def shipped_configurations() -> list[KernelConfiguration]:
    """One for all dtypes and shapes."""
    return [
        KernelConfiguration(
            name="commit_kv",
            kernel=commit_kv_kernel,
            types={"p_kv": "*i32", "p_source": "*i64", "p_target": "*i64"}
            | dict.fromkeys(("num_moves", "num_slots", "slot_words"), "i32"),
            multiples_of_16=frozenset({"p_kv", "slot_words"}),
            constants={"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C},
            num_warps=_NUM_WARPS,
            num_stages=3,
        )
    ]
