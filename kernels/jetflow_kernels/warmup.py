"""Launches each kernel that an engine can ask for, so that no request waits for a compiler.

`launch_every_kernel` is for attention layers over one cache, `launch_tree_kernels` for what is between them: drawing
noise, building trees, and walking them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from jetflow_kernels.commit_kv import commit_kv
from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store
from jetflow_kernels.shipped import DTYPES, check_head_dim, is_interpreted, runs_triton
from jetflow_kernels.tree_attention import plan_tree_attention
from jetflow_kernels.tree_attention.tuning import LARGE_TILE


def launch_every_kernel(kv: torch.Tensor, *, num_heads: int, dtype: torch.dtype) -> None:
    """What a model of `num_heads` query heads and this dtype launches over ``kv`` ``[num_layers, 2, num_pages,
    page_size, num_kv_heads, head_dim]``. Nothing is written to it, and where no kernel would run nothing is done.

    Raises:
        NotImplementedError: a head size that no kernel is shipped for.
        ValueError: more query heads share a KV head than are served.
    """
    if not runs_triton(kv.device):
        return
    nowhere = torch.full((1,), -1, dtype=torch.int64, device=kv.device)
    commit_kv(kv, nowhere, nowhere)
    if kv.dtype != dtype or dtype not in DTYPES:
        return
    num_kv_heads, head_dim = kv.shape[4:]
    check_head_dim("tree_attention", head_dim)
    k_pages, v_pages = kv[0, 0], kv[0, 1]
    for heads in (num_heads, 0):
        qkv = torch.zeros(1, heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=kv.device)
        angles = torch.zeros(1, 1, head_dim, dtype=dtype, device=kv.device)
        qk_norm_rope_store(qkv, None, angles, angles, nowhere, k_pages, v_pages, num_heads=heads, eps=1e-6)
    for num_rows in (1, LARGE_TILE):
        _attend(torch.zeros(num_rows, num_heads, head_dim, dtype=dtype, device=kv.device), k_pages, v_pages)


def launch_tree_kernels(device: torch.device, *, vocab_size: int, dtype: torch.dtype) -> None:
    """What an engine launches whose logits over so many tokens have this dtype. Where no kernel would run, or none is
    compiled, nothing is done."""
    if not runs_triton(device) or is_interpreted():
        return
    from jetflow_kernels.accept_tree import kernel as accept_tree
    from jetflow_kernels.build_tree import kernel as build_tree
    from jetflow_kernels.philox_gumbel import kernel as philox_gumbel

    philox_gumbel.launch_each_variant(device)
    build_tree.launch_each_variant(device)
    accept_tree.launch_each_variant(device, dtype=dtype, vocab_size=vocab_size)


def _attend(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """One request of so many rows, with and without a split of its keys."""
    from jetflow_kernels.tree_attention.kernel import attend, make_metadata

    num_rows, page_size = q.shape[0], k_pages.shape[1]
    plan = plan_tree_attention(
        query_lens=[num_rows],
        context_lens=[0],
        page_table=torch.zeros(1, -(-num_rows // page_size), dtype=torch.int32, device=q.device),
        parents=torch.arange(-1, num_rows - 1, dtype=torch.int32, device=q.device),
        page_size=page_size,
        is_chain=[True],
    )
    metadata = make_metadata(plan, q, k_pages.shape[2])
    for num_splits in (1, 2):
        attend(replace(metadata, num_splits=num_splits), q, k_pages, v_pages, scale=1.0)
