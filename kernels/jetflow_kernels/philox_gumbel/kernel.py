"""The Triton functions, for use inside other kernels, and a kernel that writes the noise alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from jetflow_kernels.aot import KernelConfiguration

BLOCK = 512


@triton.jit
def philox_first_word(b_position, b_token, seed):
    """uint32 of the shape of the tokens; the seed is an int64, position and token hold uint32."""
    # [BLOCK]
    b_x1 = b_token.to(tl.uint32)
    b_x0 = b_position.to(tl.uint32) + b_x1 * 0
    b_x2 = b_x1 * 0
    b_x3 = b_x1 * 0
    b_k0 = seed.to(tl.uint32) + b_x2
    b_k1 = (seed >> 32).to(tl.uint32) + b_x2
    b_m0 = b_x2 + tl.full([], 0xD2511F53, tl.uint32)
    b_m1 = b_x2 + tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        b_high0, b_high1 = tl.umulhi(b_x0, b_m0), tl.umulhi(b_x2, b_m1)
        b_low0, b_low1 = b_x0 * b_m0, b_x2 * b_m1
        b_x0, b_x1 = b_high1 ^ b_x1 ^ b_k0, b_low1
        b_x2, b_x3 = b_high0 ^ b_x3 ^ b_k1, b_low0
        b_k0 += tl.full([], 0x9E3779B9, tl.uint32)
        b_k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return b_x0


@triton.jit
def gumbel(b_position, b_token, seed):
    """float64 of the shape of the tokens."""
    b_uniform = (philox_first_word(b_position, b_token, seed).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(b_uniform))


@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=["p_seeds", "p_positions", "p_tokens"])
def philox_gumbel_kernel(p_seeds, p_positions, p_tokens, p_out, num, BLOCK: tl.constexpr):
    """Program (block): the noise of each entry."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < num
    # [BLOCK]
    b_seed = tl.load(p_seeds + o, mask=m, other=0)
    b_position = tl.load(p_positions + o, mask=m, other=0)
    b_token = tl.load(p_tokens + o, mask=m, other=0)
    tl.store(p_out + o, gumbel(b_position, b_token, b_seed), mask=m)


def philox_gumbel_triton(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """See `jetflow_kernels.philox_gumbel.philox_gumbel`."""
    out = torch.empty(token_ids.shape, dtype=torch.float64, device=token_ids.device)
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        philox_gumbel_kernel[grid](seeds, positions, token_ids, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out


def launch_each_variant(device: torch.device) -> None:
    """The one there is."""
    one = torch.zeros(1, dtype=torch.int64, device=device)
    philox_gumbel_triton(one, one, one)


def shipped_configurations() -> list[KernelConfiguration]:
    """The one there is."""
    types = {"p_seeds": "*i64", "p_positions": "*i64", "p_tokens": "*i64", "p_out": "*fp64", "num": "i32"}
    return [
        KernelConfiguration(
            name="philox_gumbel",
            kernel=philox_gumbel_kernel,
            types=types,
            constants={"BLOCK": BLOCK},
            multiples_of_16=frozenset({"p_out"}),
            num_warps=4,
            num_stages=3,
        )
    ]
