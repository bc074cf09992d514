"""Embedding and output head over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jetflow_cluster.layers.embedding import ParallelLmHead, VocabParallelEmbedding
from jetflow_cluster.parallel.tp_group import TpGroup
from layers.ranks import fill, on_ranks

VOCAB, HIDDEN = 12, 5


def _run(tp: TpGroup, tied: bool, full: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    embedding = VocabParallelEmbedding("embed", VOCAB, HIDDEN, tp)
    lm_head = ParallelLmHead(embedding, tied, VOCAB, HIDDEN, tp)
    names = [name for part in (embedding, lm_head) for name, *_ in part.pieces()]
    assert names == (["embed.weight"] if tied else ["embed.weight", "lm_head.weight"])
    fill(embedding.pieces(), full)
    fill(lm_head.pieces(), full)
    rows = embedding(torch.arange(VOCAB))
    return rows, lm_head(rows)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_and_logits_are_whole_on_every_rank(size: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    full = {f"{n}.weight": torch.randn(VOCAB, HIDDEN, generator=generator) for n in ("embed", "lm_head")}
    output = full["embed.weight" if tied else "lm_head.weight"]
    for rows, logits in on_ranks(size, lambda tp: _run(tp, tied, full)):
        assert torch.equal(rows, full["embed.weight"])
        torch.testing.assert_close(logits, F.linear(rows, output))


def test_a_vocabulary_that_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="vocab_size = 12: not divisible by tensor_parallel_size = 5"):
        VocabParallelEmbedding("embed", VOCAB, HIDDEN, TpGroup(0, 5))
