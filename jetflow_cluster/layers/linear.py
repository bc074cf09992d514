"""Linear layers without bias, split over ranks by columns (outputs) or rows (inputs)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.parallel.shard import even_slice, kv_head_slice
from jetflow_cluster.parallel.tp_group import TpGroup
from jetflow_kernels.machine import machine

#: A checkpoint tensor by its name below the layer, its full shape, the slice to read, and where it goes.
Piece = tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]

_ALL = slice(None)
#: Rows for which oneDNN is asked to lay a weight out; its layouts differ for one row and for some.
_LAYOUT_ROWS = 64


def is_packable(weight: torch.Tensor, device: torch.device) -> bool:
    """True when a weight of this shape and dtype, on this device, would be laid out by `pack`."""
    dtype = str(weight.dtype).removeprefix("torch.")
    return device.type == "cpu" and 0 not in weight.shape and machine().has_layouts(dtype)


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """A weight ``[out_size, in_size]`` in oneDNN's own layout, or None where there is none for it.

    On CPUs products with it take half the time of `torch.nn.functional.linear` and less, in fp32 and for few rows most
    of all, and a row's result does not depend on how many rows are computed with it.
    """
    if not is_packable(weight, weight.device):
        return None
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _LAYOUT_ROWS)
    return packed


def project(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
    """``[N, in_size]`` by ``[out_size, in_size]`` to a contiguous ``[N, out_size]``; with `packed` in its place."""
    if packed is None:
        return F.linear(x, weight)
    if x.shape[0] == 1:
        # The one case in which oneDNN may add up in another order.
        return project(torch.cat((x, x)), weight, packed)[:1]
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return product


def prefixed(prefix: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pieces with longer names."""
    for name, shape, slices, destination in pieces:
        yield f"{prefix}.{name}", shape, slices, destination


class Linear(InferenceModule):
    """One weight ``[out_size, in_size]``, this rank's part."""

    def __init__(self, out_size: int, in_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size), requires_grad=False)
        self._packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Once the weight is final: lays it out for the CPU, where that helps."""
        self._packed = pack(self.weight)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, in_size]`` to ``[N, out_size]``."""
        return project(x, self.weight, self._packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.product(x)


class ReplicatedLinear(Linear):
    """``[.., in_size]`` to ``[.., out_size]``, whole on every rank."""

    def __init__(self, name: str, in_size: int, out_size: int):
        super().__init__(out_size, in_size)
        self._name, self._shape = name, (out_size, in_size)

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield f"{self._name}.weight", self._shape, (_ALL, _ALL), self.weight


class MergedColumnLinear(Linear):
    """Several linears of one input as one product; each is split by outputs: the result is the rank's part of each."""

    def __init__(self, names: tuple[str, ...], in_size: int, out_sizes: tuple[int, ...], slices: tuple[slice, ...]):
        local_sizes = [s.stop - s.start for s in slices]
        super().__init__(sum(local_sizes), in_size)
        self._names, self._in_size, self._out_sizes, self._slices = names, in_size, out_sizes, slices
        #: Width of each part on this rank.
        self.local_sizes = local_sizes

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        parts = self.weight.split(self.local_sizes)
        for name, size, part, where in zip(self._names, self._out_sizes, parts, self._slices, strict=True):
            yield f"{name}.weight", (size, self._in_size), (where, _ALL), part


class GateUpLinear(MergedColumnLinear):
    """``gate_proj`` and ``up_proj`` of a SwiGLU layer."""

    def __init__(self, hidden_size: int, intermediate_size: int, tp: TpGroup):
        part = even_slice(intermediate_size, tp, "intermediate_size")
        super().__init__(("gate_proj", "up_proj"), hidden_size, (intermediate_size,) * 2, (part, part))


class QkvLinear(MergedColumnLinear):
    """``q_proj``, ``k_proj`` and ``v_proj``, split by heads."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, tp: TpGroup):
        q = even_slice(num_heads, tp, "num_attention_heads")
        kv = kv_head_slice(num_kv_heads, tp)
        self.num_local_heads, self.num_local_kv_heads = q.stop - q.start, kv.stop - kv.start
        rows = [slice(s.start * head_dim, s.stop * head_dim) for s in (q, kv, kv)]
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        super().__init__(("q_proj", "k_proj", "v_proj"), hidden_size, sizes, tuple(rows))

    @property
    def kv_weight(self) -> torch.Tensor:
        """The rows of K and V alone, ``[K + V sizes, hidden_size]``."""
        return self.weight[self.local_sizes[0] :]


class RowParallelLinear(Linear):
    """``[.., in_size / size]`` to ``[.., out_size]``: split by inputs, summed over the ranks."""

    def __init__(self, name: str, in_size: int, out_size: int, tp: TpGroup, what: str):
        part = even_slice(in_size, tp, what)
        super().__init__(out_size, part.stop - part.start)
        self._name, self._shape, self._tp, self._part = name, (out_size, in_size), tp, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self._tp.all_reduce(self.product(x))

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield f"{self._name}.weight", self._shape, (_ALL, self._part), self.weight
