"""Linear layers without bias, split over ranks by columns (outputs) or rows (inputs)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.parallel.shard import even_slice, kv_head_slice
from jetflow_cluster.parallel.tp_group import TpGroup

#: A checkpoint tensor by its name below the layer, its full shape, the slice to read, and where it goes.
Piece = tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]

_ALL = slice(None)


#: Rows between which a fp32 product on CPU is faster with the weight on the left.
_FEW_ROWS = range(2, 25)


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[N, in_size]`` by ``[out_size, in_size]`` to a contiguous ``[N, out_size]``."""
    if x.is_cpu and x.dtype is torch.float32 and x.shape[0] in _FEW_ROWS:
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight)


def prefixed(prefix: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pieces with longer names."""
    for name, shape, slices, destination in pieces:
        yield f"{prefix}.{name}", shape, slices, destination


class ReplicatedLinear(InferenceModule):
    """``[.., in_size]`` to ``[.., out_size]``, whole on every rank."""

    def __init__(self, name: str, in_size: int, out_size: int):
        super().__init__()
        self._name, self._shape = name, (out_size, in_size)
        self.weight = nn.Parameter(torch.empty(out_size, in_size), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return project(x, self.weight)

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield f"{self._name}.weight", self._shape, (_ALL, _ALL), self.weight


class MergedColumnLinear(InferenceModule):
    """Several linears of one input as one product; each is split by outputs: the result is the rank's part of each."""

    def __init__(self, names: tuple[str, ...], in_size: int, out_sizes: tuple[int, ...], slices: tuple[slice, ...]):
        super().__init__()
        self._names, self._in_size, self._out_sizes, self._slices = names, in_size, out_sizes, slices
        #: Width of each part on this rank.
        self.local_sizes = [s.stop - s.start for s in slices]
        self.weight = nn.Parameter(torch.empty(sum(self.local_sizes), in_size), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return project(x, self.weight)

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
        """The rows of K and V."""
        return self.weight[self.local_sizes[0] :]


class RowParallelLinear(InferenceModule):
    """``[.., in_size / size]`` to ``[.., out_size]``: split by inputs, summed over the ranks."""

    def __init__(self, name: str, in_size: int, out_size: int, tp: TpGroup, what: str):
        super().__init__()
        self._name, self._shape, self._tp = name, (out_size, in_size), tp
        self._part = even_slice(in_size, tp, what)
        width = self._part.stop - self._part.start
        self.weight = nn.Parameter(torch.empty(out_size, width), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self._tp.all_reduce(project(x, self.weight))

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield f"{self._name}.weight", self._shape, (_ALL, self._part), self.weight
