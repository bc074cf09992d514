"""What one request contributes to a step on static buffers, before anything is drafted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jetflow_cluster.engine.lookup import Look
from jetflow_cluster.engine.protocols import ScheduledRequest, Source
from jetflow_cluster.tree.lookup import ContextGuess, guess_weights


@dataclass(frozen=True)
class StaticPart:
    """One request's part of a static step."""

    item: ScheduledRequest
    look: Look | None

    @property
    def is_prompt(self) -> bool:
        """It ends a prompt: a token is chosen, and no tree built."""
        return self.item.num_rows > 1

    @property
    def context_len(self) -> int:
        """Tokens before the anchor; 0 for a prompt's end, whose rows lie elsewhere."""
        return 0 if self.is_prompt else self.item.request.num_computed

    @property
    def is_alone(self) -> bool:
        """Its own text guesses alone."""
        return self.look is not None and self.look.is_sure

    @property
    def asks_head(self) -> bool:
        """The draft head guesses."""
        return self.item.asks_head and not self.is_alone

    @property
    def adds_context(self) -> bool:
        """The path's tokens go on with a draft context."""
        return self.item.keeps_context and not self.is_prompt and self.item.request.has_draft_context

    @property
    def gap(self) -> int:
        """Tokens before the draft context that the head reads."""
        return self.item.request.draft_start if self.asks_head else 0

    @property
    def num_nodes(self) -> int:
        """Where nobody guesses there is the root alone."""
        return self.item.max_tree_nodes if self.asks_head or self.is_alone else 1

    @property
    def width(self) -> int:
        """Candidates of a depth that count."""
        return max(1, self.item.head_width) if self.asks_head else 1

    @property
    def source(self) -> Source:
        """Where its guesses come from."""
        if self.num_nodes == 1:
            return Source.NONE
        return Source.CHAIN if self.width == 1 else Source.HEAD

    @property
    def guesses(self) -> list[int]:
        """Tokens that its own text says next."""
        return self.look.match.token_ids if self.look is not None and self.num_nodes > 1 else []

    def num_depths(self, head_depth: int) -> int:
        """Deepest node."""
        if self.num_nodes == 1:
            return 0
        return min(self.item.max_depth, max(head_depth if self.asks_head else 0, len(self.guesses)))


def write_guesses(host: Mapping[str, np.ndarray], parts: Sequence[StaticPart], head_depth: int) -> None:
    """The inputs of a step that `mix_on_device` takes, of which the head's first `head_depth` depths count."""
    num = len(parts)
    guesses = [part.guesses for part in parts]
    for name, values in (
        ("num_own", [head_depth * part.asks_head for part in parts]),
        ("num_guesses", map(len, guesses)),
    ):
        host[name][:num] = list(values)
        host[name][num:] = 0
    for i, (part, tokens) in enumerate(zip(parts, guesses, strict=True)):
        if tokens and part.look is not None:
            host["guess_ids"][i, : len(tokens)] = tokens
            host["guess_weights"][i, : len(tokens)] = guess_weights(part.look.match)


def note_guesses(parts: Sequence[StaticPart], num_shared: Sequence[int]) -> None:
    """Notes on requests whose trees are told what their own texts guessed, the first `num_shared` tokens as the head
    did."""
    for part, num in zip(parts, num_shared, strict=False):
        if part.look is not None and part.item.request.params.speculation.include_trees:
            own = num if part.asks_head else 0
            part.item.request.context_guess = ContextGuess(token_ids=part.look.match.token_ids, num_shared=own)
