"""A tiny causal target, and decoding with it through trees, sampler and walk as the engine does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from jetflow_cluster.layers.sampler import SamplingRow, TokenCounts, choose_tokens
from jetflow_cluster.tree.accept import AcceptedPath, Choose, accept_trees
from jetflow_cluster.tree.draft_tree import DraftTree
from jetflow_cluster.types import SamplingParams

#: Tokens that end an output, and may not be chosen before `min_tokens`.
STOP_IDS = (1, 4)


class ToyTarget:
    """Logits are looked up by the last two tokens."""

    def __init__(self, vocab_size: int, seed: int, spread: float = 1.5):
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.table = torch.randn(vocab_size, vocab_size, vocab_size, generator=generator, dtype=torch.float64) * spread

    def logits(self, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
        """float64 ``[n, vocab_size]`` behind each context of two tokens or more."""
        last = torch.tensor([context[-2:] for context in contexts])
        return self.table[last[:, 0], last[:, 1]]


@dataclass
class ToyRequest:
    """One request over a toy target."""

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    counts: TokenCounts = field(init=False)

    def __post_init__(self) -> None:
        self.counts = TokenCounts(self.prompt)

    def suppressed(self, num_output: int) -> tuple[int, ...]:
        return STOP_IDS if num_output < self.params.min_tokens else ()


#: One tree per request that still decodes.
MakeTrees = Callable[[Sequence[ToyRequest]], list[DraftTree]]
Accept = Callable[[Sequence[DraftTree], Choose], list[AcceptedPath]]


def root_trees(requests: Sequence[ToyRequest]) -> list[DraftTree]:
    """No speculation."""
    return [DraftTree.root_only((request.prompt + request.output)[-1]) for request in requests]


def decode_step(
    target: ToyTarget, requests: Sequence[ToyRequest], make_trees: MakeTrees, accept: Accept = accept_trees
) -> list[AcceptedPath]:
    """One step of all requests; every token of the accepted paths is committed."""

    def choose(walking: list[tuple[int, int, list[int]]]) -> list[int]:
        rows, contexts = [], []
        for r, _, path in walking:
            request = requests[r]
            num_output = len(request.output) + len(path)
            contexts.append((request.prompt + request.output + path)[-2:])
            rows.append(
                SamplingRow(
                    params=request.params,
                    seed=request.seed,
                    position=len(request.prompt) + num_output,
                    counts=request.counts,
                    path=path,
                    suppressed_ids=request.suppressed(num_output),
                )
            )
        return choose_tokens(target.logits(contexts), rows)

    paths = accept(make_trees(requests), choose)
    for request, path in zip(requests, paths, strict=True):
        request.output += path.token_ids
        request.counts.extend(path.token_ids)
    return paths


def decode(target: ToyTarget, requests: Sequence[ToyRequest], num_tokens: int, make_trees: MakeTrees) -> float:
    """Decodes until every request has `num_tokens` output tokens; returns tokens per step and request."""
    num_steps = num_produced = 0
    while unfinished := [request for request in requests if len(request.output) < num_tokens]:
        num_produced += sum(len(path.token_ids) for path in decode_step(target, unfinished, make_trees))
        num_steps += len(unfinished)
    return num_produced / num_steps
