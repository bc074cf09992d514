"""Paged attention as a layer: what it stores, and that its ranks make the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jetflow_cluster.layers.attention import PagedAttention
from jetflow_cluster.layers.rotary import RopeConfig, Rotary
from jetflow_cluster.parallel.tp_group import TpGroup
from layers.ranks import fill, on_ranks
from support.paged import empty_kv, make_batch

HIDDEN, HEADS, DIM = 10, 4, 6
CPU = torch.device("cpu")


def _weights(kv_heads: int) -> dict[str, torch.Tensor]:
    shapes = {"q_proj": (HEADS * DIM, HIDDEN), "k_proj": (kv_heads * DIM, HIDDEN), "v_proj": (kv_heads * DIM, HIDDEN)}
    shapes |= {"o_proj": (HIDDEN, HEADS * DIM), "q_norm": (DIM,), "k_norm": (DIM,)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def _layer(kv_heads: int, tp: TpGroup) -> PagedAttention:
    layer = PagedAttention(HIDDEN, HEADS, kv_heads, DIM, 1e-6, tp).double()
    fill(layer.pieces(), _weights(kv_heads))
    return layer


def _run(kv_heads: int, tp: TpGroup) -> tuple[torch.Tensor, torch.Tensor]:
    layer = _layer(kv_heads, tp)
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = make_batch([[0] * 4, [0] * 2], [0, 0], [[-1, 0, 0, 1], None])
    cos, sin = Rotary(RopeConfig(), DIM, CPU).angles(batch.positions, torch.float64)
    kv = empty_kv(1, layer.num_kv_heads, DIM, torch.float64)[0]
    before = x.clone()
    out = layer(x, cos, sin, batch.slot_mapping, batch.attention, kv[0], kv[1])
    assert torch.equal(x, before)
    written = (~kv.isnan()).flatten(3).all(-1).flatten(1).sum(1).tolist()
    assert written == [6, 6]
    return out, kv


@pytest.mark.parametrize("size, kv_heads", [(2, 4), (2, 2), (4, 2), (4, 1)], ids=str)
def test_ranks_make_the_whole(size: int, kv_heads: int) -> None:
    expected, kv = _run(kv_heads, TpGroup.single())
    for rank, (out, local) in enumerate(on_ranks(size, lambda tp: _run(kv_heads, tp))):
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        heads = (
            [rank * kv_heads // size]
            if size > kv_heads
            else range(rank * kv_heads // size, (rank + 1) * kv_heads // size)
        )
        torch.testing.assert_close(local, kv[..., list(heads), :], equal_nan=True)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_context_is_stored_as_rows_are(kv_heads: int) -> None:
    layer = _layer(kv_heads, TpGroup.single())
    _, expected = _run(kv_heads, TpGroup.single())
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = make_batch([[0] * 4, [0] * 2], [0, 0], [[-1, 0, 0, 1], None])
    cos, sin = Rotary(RopeConfig(), DIM, CPU).angles(batch.positions, torch.float64)
    kv = empty_kv(1, kv_heads, DIM, torch.float64)[0]
    for rows in (slice(0, 1), slice(1, 6)):
        layer.store_context(
            F.linear(x[rows], layer.qkv.kv_weight), cos[rows], sin[rows], batch.slot_mapping[rows], kv[0], kv[1]
        )
    torch.testing.assert_close(kv, expected, atol=1e-12, rtol=0, equal_nan=True)


def test_a_model_without_norm_of_q_and_k() -> None:
    layer = PagedAttention(HIDDEN, HEADS, 2, DIM, 1e-6, TpGroup.single(), has_qk_norm=False).double()
    weights = {name: tensor for name, tensor in _weights(2).items() if "_norm" not in name}
    fill(layer.pieces(), weights)
    normed = _layer(2, TpGroup.single())
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    batch = make_batch([[0] * 3], [0], [None])
    cos, sin = Rotary(RopeConfig(), DIM, CPU).angles(batch.positions, torch.float64)
    outs, pages = [], []
    for each in (layer, normed):
        kv = empty_kv(1, 2, DIM, torch.float64)[0]
        outs.append(each(x, cos, sin, batch.slot_mapping, batch.attention, kv[0], kv[1]))
        pages.append(kv)
    # V knows no norm, and the first row sees itself alone.
    torch.testing.assert_close(pages[0][1], pages[1][1], equal_nan=True)
    torch.testing.assert_close(outs[0][0], outs[1][0])
    stored = pages[0][0].view(-1, 2, DIM)[batch.slot_mapping]
    rows = F.linear(x, layer.qkv.kv_weight)
    torch.testing.assert_close(stored.norm(dim=-1), rows.view(3, 4, DIM)[:, :2].norm(dim=-1))
    assert not torch.allclose(stored, pages[1][0].view(-1, 2, DIM)[batch.slot_mapping])
    context = empty_kv(1, 2, DIM, torch.float64)[0]
    layer.store_context(rows, cos, sin, batch.slot_mapping, context[0], context[1])
    torch.testing.assert_close(context, pages[0], equal_nan=True)
