"""What counts as a repetition, and that a step of training makes it less likely."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jetflow_cluster.training import loops
from support.small_models import write_target


def test_repetitions_are_ends_of_ngrams_seen_before() -> None:
    marks = loops.repetitions(np.array([[1, 2, 3, 1, 2, 3, 1, 9], [7, 7, 7, 7, 7, 8, 7, 7]]), ngram=3)
    assert marks.astype(int).tolist() == [[0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0]]


def test_a_step_makes_marked_tokens_less_likely_and_leaves_unmarked_ones_out(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_target(tmp_path), dtype=torch.float32)
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (3, 24))
    repeated = torch.zeros(2, 24)
    repeated[0, 10:] = 1.0

    def logprobs() -> torch.Tensor:
        rows = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return rows.gather(-1, ids[:, 1:, None])[..., 0].detach()

    before = logprobs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        penalty = loops.losses(model, ids, repeated, 1)[1]
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    change = logprobs() - before
    assert float(change[1, 9:].mean()) < -0.01
    assert abs(float(change[1, 9:].mean())) > 2 * abs(float(change[2].mean()))
