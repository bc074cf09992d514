"""The compiled functions of CPUs against plain torch, and a row's result in every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jetflow_kernels.cpu import CpuKernels, cpu_kernels, library, rows
from jetflow_kernels.pointwise import rms_norm, silu_mul
from jetflow_kernels.qk_norm_rope_store import qk_norm_rope_store
from support.rope_rows import EPS, RopeRows, make_rows

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
#: The last is enough for several threads.
NUM_ROWS = [1, 7, 300]


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Without a compiler there is nothing to test."""
    if cpu_kernels().functions is None:
        pytest.skip(cpu_kernels().detail)


@contextmanager
def plain_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_found", CpuKernels(functions=None, detail="off"))
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Of very different sizes from row to row."""
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(*shape, generator=generator) * torch.logspace(-3, 1, shape[0])[:, None]).to(dtype)


def assert_like_torch(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """fp32 within a few units in the last place; bf16 within one, and nearly all equal. NaN where NaN is."""
    assert found.dtype is wanted.dtype and found.shape == wanted.shape
    if wanted.dtype is torch.float32:
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-6, equal_nan=True)
        return
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-6, equal_nan=True)
    num_other = int((found.nan_to_num(7.0) != wanted.nan_to_num(7.0)).sum())
    assert num_other <= 1 + 0.005 * wanted.numel()


def served(result: torch.Tensor | None) -> torch.Tensor:
    assert result is not None, "left to plain torch"
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 10, 33, 384, 1000])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("is_chunk", [False, True], ids=["whole", "chunk"])
def test_norm(dtype: torch.dtype, size: int, num_rows: int, is_chunk: bool) -> None:
    x = randn(num_rows, 2 * size + 3, dtype=dtype)[:, 3 : 3 + size]
    x = x if is_chunk else x.contiguous()
    weight = randn(size, 1, dtype=dtype)[:, 0].contiguous()
    with plain_torch():
        wanted = rms_norm(x, weight, EPS)
    assert_like_torch(served(rows.rms_norm(x, weight, EPS)), wanted)
    assert torch.equal(rms_norm(x, weight, EPS), served(rows.rms_norm(x, weight, EPS)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 37, 1280])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("is_chunk", [False, True], ids=["whole", "chunk"])
def test_silu_mul(dtype: torch.dtype, size: int, num_rows: int, is_chunk: bool) -> None:
    x = 8 * randn(num_rows, 2 * size + 5, dtype=dtype)[:, 5:]
    x = x if is_chunk else x.contiguous()
    with plain_torch():
        wanted = silu_mul(x)
    assert_like_torch(served(rows.silu_mul(x)), wanted)
    assert torch.equal(silu_mul(x), served(rows.silu_mul(x)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_everything(dtype: torch.dtype) -> None:
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, -3e38, 1e-40, -1e-40]
    gate = torch.cat([torch.linspace(-120, 120, 100_001), torch.tensor(special)]).to(dtype)
    found = served(rows.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None]))[0]
    wanted = torch.nn.functional.silu(gate)
    torch.testing.assert_close(found, wanted, rtol=2**-7 if dtype is torch.bfloat16 else 5e-7, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), wanted.signbit() | (found.isnan() & found.signbit()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_rows(dtype: torch.dtype) -> None:
    x = randn(6, 65, dtype=dtype)
    x[1, 64], x[3, 7] = float("nan"), float("inf")
    weight = torch.ones(65, dtype=dtype)
    with plain_torch():
        wanted = rms_norm(x, weight, EPS)
    assert_like_torch(served(rows.rms_norm(x, weight, EPS)), wanted)
    assert wanted[1].isnan().all() and wanted[3].isnan().sum() == 1


def _rope_rows(num_rows: int, dtype: torch.dtype, pages: torch.dtype, **kwargs: object) -> RopeRows:
    made = make_rows(num_rows, dtype=dtype, **{"heads": (4, 2), "head_dim": 64, **kwargs})
    return replace(made, k_pages=made.k_pages.to(pages), v_pages=made.v_pages.to(pages))


@pytest.mark.parametrize(
    "dtype, pages",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "bf16-in-fp32", "bf16"],
)
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("heads, head_dim", [((4, 2), 64), ((3, 1), 10), ((0, 2), 128), ((5, 5), 38)], ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_qk_norm_rope_store(
    dtype: torch.dtype, pages: torch.dtype, has_norm: bool, heads: tuple[int, int], head_dim: int, num_rows: int
) -> None:
    plain = _rope_rows(num_rows, dtype, pages, heads=heads, head_dim=head_dim, has_norm=has_norm)
    wide = torch.nn.functional.pad(plain.qkv, (0, 0, 1, 2))
    ours = replace(plain.to("cpu"), qkv=wide[:, 1:-2])
    with plain_torch():
        wanted = qk_norm_rope_store(*plain.arguments(), num_heads=heads[0], eps=EPS)
    q = served(rows.qk_norm_rope_store(*ours.arguments(), num_heads=heads[0], eps=EPS))
    pairs = [(q, wanted), (ours.k_pages, plain.k_pages)]
    for found, expected in pairs:
        assert_like_torch(found, expected)
    assert torch.equal(ours.v_pages.nan_to_num(7.0), plain.v_pages.nan_to_num(7.0))


@pytest.mark.parametrize("slot", [-1, 48])
def test_a_slot_that_is_none_is_refused(slot: int) -> None:
    made = _rope_rows(3, torch.float32, torch.float32, page_size=24)
    made.slots[1] = slot
    with pytest.raises(IndexError, match="not one of the 48 slots"):
        qk_norm_rope_store(*made.arguments(), num_heads=4, eps=EPS)
    assert made.k_pages.isnan().all() and made.v_pages.isnan().all()


def _norm_of(dtype: torch.dtype) -> Callable[[slice], torch.Tensor]:
    x, weight = randn(300, 390, dtype=dtype), randn(390, 1, dtype=dtype)[:, 0].contiguous()
    return lambda part: served(rows.rms_norm(x[part], weight, EPS))


def _silu_of(dtype: torch.dtype) -> Callable[[slice], torch.Tensor]:
    x = randn(300, 2 * 391, dtype=dtype)
    return lambda part: served(rows.silu_mul(x[part]))


def _rope_of(dtype: torch.dtype) -> Callable[[slice], torch.Tensor]:
    made = _rope_rows(300, dtype, torch.float32, head_dim=38)

    def compute(part: slice) -> torch.Tensor:
        tensors = (made.qkv[part], made.norm_weight, made.cos[part], made.sin[part], made.slots[part])
        pages = made.k_pages.clone(), made.v_pages.clone()
        q = served(rows.qk_norm_rope_store(*tensors, *pages, num_heads=4, eps=EPS))
        stored = [page.flatten(0, 1)[made.slots[part]] for page in pages]
        return torch.cat([q, *(each.to(dtype) for each in stored)], 1)

    return compute


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [_norm_of, _silu_of, _rope_of], ids=["norm", "silu", "rope"])
def test_a_row_is_the_same_in_every_batch(
    make: Callable[[torch.dtype], Callable[[slice], torch.Tensor]], dtype: torch.dtype
) -> None:
    compute = make(dtype)
    with threads(1):
        alone = torch.cat([compute(slice(i, i + 1)) for i in range(300)])
    for num_threads in (1, 2):
        with threads(num_threads):
            for size in (2, 17, 300):
                batched = torch.cat([compute(slice(i, i + size)) for i in range(0, 300, size)])
                assert torch.equal(batched, alone), (num_threads, size)


@pytest.mark.parametrize(
    "x, weight",
    [
        pytest.param(torch.ones(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), id="fp64"),
        pytest.param(torch.ones(2, 8, dtype=torch.float16), torch.ones(8, dtype=torch.float16), id="fp16"),
        pytest.param(torch.ones(8, 2).T, torch.ones(8), id="transposed"),
        pytest.param(torch.ones(2, 3, 8), torch.ones(3, 8), id="broadcast"),
        pytest.param(torch.ones(2, 8), torch.ones(16)[::2], id="weight-with-gaps"),
        pytest.param(torch.ones(2, 8), torch.ones(1), id="weight-of-one"),
        pytest.param(torch.ones(2, 8, requires_grad=True), torch.ones(8), id="gradients"),
        pytest.param(torch.ones(2, 8), torch.ones(8, requires_grad=True), id="gradients-of-weights"),
    ],
)
def test_the_rest_is_left_to_torch(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert rows.rms_norm(x, weight, EPS) is None
    with torch.no_grad():
        assert torch.allclose(rms_norm(x, weight, EPS), x, atol=1e-2)


def test_tensors_without_memory_are_left_to_torch() -> None:
    with FakeTensorMode():
        x = torch.ones(2, 8)
        assert rows.rms_norm(x, torch.ones(8), EPS) is None
        assert silu_mul(x).shape == (2, 4)
    assert silu_mul(torch.ones(2, 8, device="meta")).shape == (2, 4)


def test_gradients_pass() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    silu_mul(x).sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
