"""Each rank's part of a linear layer, and that the parts make the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import (
    GateUpLinear,
    QkvLinear,
    ReplicatedLinear,
    RowParallelLinear,
    pack,
    prefixed,
    project,
)
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.machine import machine
from layers.ranks import fill, on_ranks


def _full(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_up_are_split_alike(size: int) -> None:
    full, x = _full(gate_proj=(8, 5), up_proj=(8, 5)), torch.randn(3, 5)
    gates, ups = [], []
    for rank in range(size):
        layer = GateUpLinear(5, 8, TpGroup(rank, size))
        fill(layer.pieces(), full)
        gate, up = layer(x).chunk(2, -1)
        gates.append(gate)
        ups.append(up)
    torch.testing.assert_close(torch.cat(gates, -1), F.linear(x, full["gate_proj.weight"]))
    torch.testing.assert_close(torch.cat(ups, -1), F.linear(x, full["up_proj.weight"]))


@pytest.mark.parametrize(
    "size, heads, kv_heads", [(1, 4, 2), (2, 4, 2), (4, 4, 2), (4, 8, 1), (2, 6, 6)], ids=lambda value: str(value)
)
def test_every_query_head_meets_its_own_kv_head(size: int, heads: int, kv_heads: int) -> None:
    dim = 2
    full = _full(q_proj=(heads * dim, 5), k_proj=(kv_heads * dim, 5), v_proj=(kv_heads * dim, 5))
    x = torch.randn(3, 5)
    q, k, v = (F.linear(x, full[f"{n}_proj.weight"]).view(3, -1, dim) for n in "qkv")
    first = 0
    for rank in range(size):
        layer = QkvLinear(5, heads, kv_heads, dim, TpGroup(rank, size))
        fill(layer.pieces(), full)
        num, num_kv = layer.num_local_heads, layer.num_local_kv_heads
        local = layer(x).view(3, -1, dim).split([num, num_kv, num_kv], 1)
        for i in range(num):
            head = first + i
            torch.testing.assert_close(local[0][:, i], q[:, head])
            torch.testing.assert_close(local[1][:, i * num_kv // num], k[:, head * kv_heads // heads])
            torch.testing.assert_close(local[2][:, i * num_kv // num], v[:, head * kv_heads // heads])
        torch.testing.assert_close(F.linear(x, layer.kv_weight), torch.cat([t.flatten(1) for t in local[1:]], -1))
        first += num
    assert first == heads


@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_sums_over_the_ranks(size: int) -> None:
    full, x = _full(down_proj=(5, 8)), torch.randn(3, 8)

    def work(tp: TpGroup) -> torch.Tensor:
        layer = RowParallelLinear("down_proj", 8, 5, tp, "intermediate_size")
        fill(layer.pieces(), full)
        return layer(x.chunk(size, -1)[tp.rank])

    for out in on_ranks(size, work):
        torch.testing.assert_close(out, F.linear(x, full["down_proj.weight"]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda tp: GateUpLinear(5, 9, tp), "intermediate_size = 9: not divisible by tensor_parallel_size = 4"),
        (lambda tp: QkvLinear(5, 6, 2, 2, tp), "num_attention_heads = 6: not divisible by tensor_parallel_size = 4"),
        (lambda tp: QkvLinear(5, 12, 3, 2, tp), "num_key_value_heads = 3: not divisible by tensor_parallel_size = 4"),
        (lambda tp: RowParallelLinear("down_proj", 10, 5, tp, "inner"), "inner = 10: not divisible"),
    ],
    ids=["gate-up", "heads", "kv-heads", "row"],
)
def test_sizes_that_cannot_be_split(make: Callable[[TpGroup], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(TpGroup(0, 4))


def test_names_grow_by_prefixes() -> None:
    names = [name for name, *_ in prefixed("layers.3", prefixed("mlp", ReplicatedLinear("fc", 2, 3).pieces()))]
    assert names == ["layers.3.mlp.fc.weight"]


class _Pair(InferenceModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ReplicatedLinear("fc", 2, 3)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def test_inference_module_is_a_module() -> None:
    pair = _Pair()
    assert set(pair.state_dict()) == {"inner.weight", "scale"}
    assert len(list(pair.parameters())) == 2
    with torch.device("meta"):
        pair = _Pair()
    # New parameters take the place of the old ones; the layer must not go on using those.
    pair.to(torch.float64).to_empty(device="cpu")
    for parameter in pair.parameters():
        parameter.data.fill_(2.0)
    out = pair(torch.ones(1, 2, dtype=torch.float64))
    assert out.tolist() == [[8.0, 8.0, 8.0]]
    assert pair.inner.weight is dict(pair.named_parameters())["inner.weight"]
    twin = copy.deepcopy(pair)
    twin.inner.weight.data.zero_()
    assert twin(torch.ones(1, 2, dtype=torch.float64)).abs().sum() == 0
    assert pair.inner.weight.abs().sum() > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("in_size, out_size", [(1280, 384), (384, 4096), (33, 47), (16, 1)], ids=str)
def test_a_packed_weight_gives_each_row_the_same_whatever_the_batch(
    in_size: int, out_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_size, in_size, generator=generator).to(dtype)
    x = torch.randn(65, in_size, generator=generator).to(dtype)
    packed = pack(weight)
    if packed is None:
        assert not machine().has_layouts(str(dtype).removeprefix("torch."))
        pytest.skip(f"{machine().processor} has no layouts for {dtype}")
    whole = project(x, weight, packed)
    exact = x.double() @ weight.double().T
    assert float((whole.double() - exact).abs().max()) < tolerance * float(exact.abs().max())
    for num_rows in (0, 1, 2, 3, 8, 17, 64):
        assert torch.equal(project(x[:num_rows], weight, packed), whole[:num_rows]), num_rows


@pytest.mark.parametrize("weight", [torch.zeros(3, 2, dtype=torch.float64), torch.zeros(0, 2)], ids=["fp64", "empty"])
def test_what_cannot_be_packed_is_left_as_it_is(weight: torch.Tensor) -> None:
    assert pack(weight) is None
    assert project(torch.ones(4, 2, dtype=weight.dtype), weight).shape == (4, weight.shape[0])
