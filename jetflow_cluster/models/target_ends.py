"""Embedding and output layer, which all targets have, and all that a draft head elsewhere needs of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from jetflow_cluster.layers.embedding import ParallelLmHead, VocabParallelEmbedding
from jetflow_cluster.layers.inference_module import InferenceModule
from jetflow_cluster.layers.linear import Piece
from jetflow_cluster.models.config import TargetConfig
from jetflow_cluster.parallel.tp_group import TpGroup


class TargetEnds(InferenceModule):
    """One rank's part of both. By itself it is what a draft worker holds."""

    def __init__(self, config: TargetConfig, tp: TpGroup):
        super().__init__()
        self.config = config
        #: Where the weights come from; set by the loader.
        self.checkpoint_dir: Path | None = None
        self.embedding = VocabParallelEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, tp)
        self.lm_head = ParallelLmHead(
            self.embedding, config.tie_word_embeddings, config.vocab_size, config.hidden_size, tp
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, activations and KV."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 ids ``[N]`` to ``[N, hidden_size]``."""
        rows: torch.Tensor = self.embedding(token_ids)
        return rows

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[M, hidden_size]`` to ``[M, vocab_size]``, whole on every rank."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def pieces(self) -> Iterator[Piece]:
        """What to read from a checkpoint."""
        yield from self.embedding.pieces()
        yield from self.lm_head.pieces()
