"""The first Philox4x32-10 word on the CPU, in place and in blocks that stay in the cache.

`noise.philox_4x32_10` defines the answer; this gives its first word at half the time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from jetflow_cluster.tree.philox import MASK, MULTIPLIER_0, MULTIPLIER_1, NUM_ROUNDS, WEYL_0, WEYL_1

_Words = npt.NDArray[np.uint64]
#: Most counters of one block; six arrays of them are in use at a time.
_BLOCK = 16_384
_MASK, _SHIFT = np.uint64(MASK), np.uint64(32)
_M0, _M1, _W0, _W1 = (np.uint64(word) for word in (MULTIPLIER_0, MULTIPLIER_1, WEYL_0, WEYL_1))


def philox_first_word(
    c0: torch.Tensor, c1: torch.Tensor, c2: int, key0: int | torch.Tensor, key1: int | torch.Tensor
) -> torch.Tensor:
    """The first word of the counters (c0, c1, c2, 0).

    Args:
        c0, c1: counter words, int64 holding uint32, on the CPU.
        c2: third counter word.
        key0, key1: key words, integers or int64 tensors holding uint32.

    Returns:
        int64 holding uint32, of the shape to which all arguments broadcast.
    """
    operands = [_words(x) for x in (c0, c1, key0, key1)]
    shape = np.broadcast_shapes(*(x.shape for x in operands))
    words = np.empty(shape, np.uint64)
    _fill(words, np.uint64(c2), *(x.reshape((1,) * (len(shape) - x.ndim) + x.shape) for x in operands))
    return torch.from_numpy(words.view(np.int64))


def _words(x: int | torch.Tensor) -> _Words:
    return np.array(x, np.uint64) if isinstance(x, int) else x.numpy().view(np.uint64)


def _fill(out: _Words, c2: np.uint64, *operands: _Words) -> None:
    """Writes the words of `out`, half by half along the first axis until a half is a block."""
    if out.size <= _BLOCK:
        out[...] = _block(out.shape, c2, *operands)
    elif out.shape[0] == 1:
        _fill(out[0], c2, *(x[0] for x in operands))
    else:
        middle = out.shape[0] // 2
        for part in (slice(middle), slice(middle, None)):
            _fill(out[part], c2, *(x if x.shape[0] == 1 else x[part] for x in operands))


def _block(shape: tuple[int, ...], c2: np.uint64, position: _Words, token: _Words, k0: _Words, k1: _Words) -> _Words:
    multiply, shift, xor, mask = np.multiply, np.right_shift, np.bitwise_xor, np.bitwise_and
    x0, x1, x2, x3, p0, p1 = (np.empty(shape, np.uint64) for _ in range(6))
    x0[...], x1[...], x2[...], x3[...] = position, token, c2, 0
    for i in range(NUM_ROUNDS):
        if i:
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        multiply(x0, _M0, p0)
        multiply(x2, _M1, p1)
        # x1 and x3 may carry garbage above bit 31; the mask behind their only use removes it.
        mask(xor(xor(shift(p1, _SHIFT, x0), x1, x0), k0, x0), _MASK, x0)
        mask(xor(xor(shift(p0, _SHIFT, x2), x3, x2), k1, x2), _MASK, x2)
        x1, p1, x3, p0 = p1, x1, p0, x3
    return x0
