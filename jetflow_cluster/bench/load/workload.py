"""What is asked of every system alike: prompts and output lengths of each round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from jetflow_cluster.bench.prompts import BenchPrompt


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """One request of a round."""

    prompt: BenchPrompt
    #: Output tokens: exactly so many where the system can be told to ignore end-of-text.
    max_tokens: int
    #: Seconds after the round's begin at which it is sent; None is as soon as another one ends.
    arrives_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request."""

    token_ids: tuple[int, ...]
    #: Seconds from its arrival to its first token, and to its end.
    first_s: float
    took_s: float
    #: Seconds from the round's begin, and the tokens that came then; in order.
    emitted: tuple[tuple[float, float], ...]
    #: Verify steps, and guesses that they accepted; zeros where a system does not tell.
    num_steps: int = 0
    num_accepted: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Speed as its reader sees it, behind the first token."""
        return (len(self.token_ids) - 1) / max(self.took_s - self.first_s, 1e-9)


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """One round of one system."""

    #: From the first arrival to the last end.
    seconds: float
    outcomes: tuple[Outcome, ...]
    #: Requests at a time, in a closed loop; None in an open one.
    num_concurrent: int | None = None
    #: Part of the steps' time in which requests were scheduled, nodes priced and trees built; None where none is told.
    planning_share: float | None = None

    @property
    def held_s(self) -> float:
        """Seconds for which the load was held: until fewer requests were left than run at a time. In an open loop, and
        where no token came before, that is the whole round."""
        if self.num_concurrent is None:
            return self.seconds
        ends = sorted(outcome.emitted[-1][0] if outcome.emitted else self.seconds for outcome in self.outcomes)
        return ends[max(0, len(ends) - self.num_concurrent)]

    @property
    def tokens_per_s(self) -> float:
        """All requests' output tokens per second while the load was held. What comes behind that says how unequal the
        last requests were, not what the load costs."""
        held_s = self.held_s
        return sum(num for outcome in self.outcomes for at_s, num in outcome.emitted if at_s <= held_s) / held_s


def make_requests(
    prompts: Sequence[BenchPrompt],
    count: int,
    *,
    prompt_lengths: Sequence[int],
    output_lengths: Sequence[int],
    arrivals: Sequence[float] | None,
    seed: str,
) -> list[LoadRequest]:
    """The requests of a round; the same for the same arguments.

    Args:
        prompts: to draw from.
        count: how many.
        prompt_lengths: tokens that prompts are cut to at the left, each length equally often.
        output_lengths: output tokens, likewise.
        arrivals: seconds of arrival; None is a closed loop.
        seed: of the draw.
    """
    rng = random.Random(seed)
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    if count < len(prompts):
        chosen = rng.sample(list(prompts), count)
    requests = []
    for i, prompt in enumerate(chosen):
        token_ids = prompt.token_ids[-prompt_lengths[i % len(prompt_lengths)] :]
        requests.append(
            LoadRequest(
                prompt=BenchPrompt(name=prompt.name, text=prompt.text, token_ids=token_ids),
                max_tokens=output_lengths[i % len(output_lengths)],
                arrives_s=arrivals[i] if arrivals is not None else None,
            )
        )
    if arrivals is None:
        rng.shuffle(requests)
    return requests
