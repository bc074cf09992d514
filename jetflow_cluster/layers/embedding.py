"""Embedding and output head, split over ranks by the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import Piece, pack, project
from jetflow_cluster.parallel.shard import even_slice
from jetflow_cluster.parallel.tp_group import TpGroup


class VocabParallelEmbedding(InferenceModule):
    """int64 ids ``[N]`` to ``[N, hidden_size]``."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, tp: TpGroup):
        super().__init__()
        self._name, self._shape, self._tp = name, (vocab_size, hidden_size), tp
        self.part = even_slice(vocab_size, tp, "vocab_size")
        self.weight = nn.Parameter(torch.empty(self.part.stop - self.part.start, hidden_size), requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self._tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.part.start
        is_mine = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(torch.where(is_mine, local, 0), self.weight)
        return self._tp.all_reduce(rows.masked_fill_(~is_mine[:, None], 0.0))

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield f"{self._name}.weight", self._shape, (self.part, slice(None)), self.weight


class ParallelLmHead(InferenceModule):
    """``[M, hidden_size]`` to logits ``[M, vocab_size]``, gathered; shares the embedding's weight when tied."""

    def __init__(self, embedding: VocabParallelEmbedding, tied: bool, vocab_size: int, hidden_size: int, tp: TpGroup):
        super().__init__()
        self._tp, self._tied = tp, tied
        self._own = None if tied else VocabParallelEmbedding("lm_head", vocab_size, hidden_size, tp)
        self._shared = [embedding]
        self._packed: torch.Tensor | None = None

    def pack(self) -> None:
        """See `Linear.pack`."""
        self._packed = pack(self.weight)

    @property
    def weight(self) -> torch.Tensor:
        """``[vocab_size / size, hidden_size]``."""
        return self._shared[0].weight if self._own is None else self._own.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self._tp.all_gather_last_dim(project(hidden, self.weight, self._packed))

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        if self._own is not None:
            yield from self._own.pieces()
