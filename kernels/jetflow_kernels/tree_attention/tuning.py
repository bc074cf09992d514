"""Tile sizes per head size and dtype, the same for every chip that is compiled for; splits per chip."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Query rows times heads of a tile: few for single tokens, many for trees and prompt chunks.
SMALL_TILE, LARGE_TILE = 16, 64
#: Programs per multiprocessor that keep a chip's memory busy.
_PROGRAMS_PER_SM = 2
#: Fewest tiles of keys that are worth a program of their own, and most programs that share a tile's keys.
_KEY_TILES_PER_SPLIT = 4
MAX_SPLITS = 32


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one program works."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tile(dtype: torch.dtype, head_dim: int, largest_request: int) -> Tile:
    """The tile for a batch whose largest request has so many rows times heads per KV head."""
    head_dim = 1 << (head_dim - 1).bit_length()  # what it is padded to
    is_wide = head_dim > 128
    if dtype is torch.float32:
        # Products of fp32 in full precision run outside of the tensor cores, with operands in registers.
        return Tile(block_m=16, block_n=16, num_warps=4 if head_dim <= 64 else 8, num_stages=1)
    if largest_request <= SMALL_TILE:
        return Tile(block_m=SMALL_TILE, block_n=32 if is_wide else 64, num_warps=4, num_stages=2)
    is_narrow = head_dim <= 64
    block_n = 32 if is_wide else 64
    return Tile(block_m=LARGE_TILE, block_n=block_n, num_warps=4 if is_narrow else 8, num_stages=2)


def choose_splits(num_programs: int, num_key_tiles: int, num_sms: int) -> int:
    """Programs that share the keys of a tile, so that a small batch over a long context fills the chip."""
    wanted = -(-_PROGRAMS_PER_SM * num_sms // max(1, num_programs))
    return max(1, min(wanted, num_key_tiles // _KEY_TILES_PER_SPLIT, MAX_SPLITS))
