"""Whether trees kept what they promised: tokens per second of steps with trees beside those of steps without.

Costs are foretold from a model, and a model errs: trees of many sizes in one batch, or a busy machine, cost more than
was measured. So every kind of step is also timed as it comes, by load. A kind that twice in a row is behind the pace
that it must keep, by more than chance explains, is left out for a while, longer each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from jetflow_cluster.engine.begun_steps import BegunStep
from jetflow_cluster.engine.cost_model import CostModel
from jetflow_cluster.tree.accept import AcceptedPath
from jetflow_cluster.tree.draft_tree import DraftTree

#: What is left of an observation's weight after each later one of its kind and load.
_FADE = 0.98
#: Steps of all requests together before a kind is judged, and the fewest steps: a single request's luck varies.
_NUM_JUDGED, _LEAST_JUDGED = 96, 6
#: Steps for which a kind is left out: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 256, 4096
#: Steps with trees behind which a plain one is timed; where trees are less than so far ahead, when there is little to
#: lose and much to know; and plain steps that are timed before anything is known.
_PLAIN_EVERY, _PLAIN_OFTEN, _NEAR, _NUM_PLAIN = 192, 32, 1.15, 4
#: Variances over squared means: of the tokens that a request gets in a step with guesses, and of a step's time; and
#: standard errors that count as chance.
_TOKEN_SPREAD, _TIME_SPREAD, _NUM_ERRORS = 0.4, 0.01, 0.5
#: Pace beside plain steps that a kind must keep: what goes on between steps has its price too, and so have the draft
#: contexts that go on while plain steps are timed.
_LEAST_GAIN = 1.05
#: Share of a step's time that its prompts may take where the rest is judged.
_MOST_PROMPTS = 0.3
#: Seconds that a plain step is foretold at least.
_LEAST_S = 1e-6
#: A step that took this many times the mean of its kind was held up by something else, and counts as this many.
_MOST = 3.0


class StepKind(Enum):
    """What a step did for its decoding requests."""

    PLAIN = "plain"
    #: The draft head guessed.
    HEAD = "head"
    #: Only the requests' own texts did.
    LOOKUP = "lookup"


@dataclass(kw_only=True)
class _Record:
    """Decayed sums of one kind at one load."""

    #: Per request, so that a load that shrinks within its range is no gain and no loss.
    tokens: float = 0.0
    #: In plain steps, as they are foretold for the same requests.
    time: float = 0.0
    num: float = 0.0
    #: Steps at that load since it was last seen.
    age: int = 0
    #: Steps for which it is still left out, and for how many it will be the next time.
    pause: int = 0
    next_pause: int = _FIRST_PAUSE
    #: Whether it was behind when it was last judged.
    is_doubted: bool = False

    @property
    def pace(self) -> float:
        return self.tokens / self.time if self.time > 0 else 0.0

    def forget(self) -> None:
        self.tokens = self.time = self.num = 0.0


class Pace:
    """Timed steps by kind and load; loads that are within an eighth of one of three per octave count as one."""

    def __init__(self) -> None:
        self._records: dict[tuple[StepKind, int], _Record] = {}

    def observe_step(
        self,
        begun: BegunStep,
        trees: Sequence[DraftTree],
        paths: Sequence[AcceptedPath | None],
        took_s: float,
        cost: CostModel,
        measured: CostModel,
    ) -> None:
        """Counts a step whose trees are the policy's own choice, but for what its prompts took by `cost`; `measured` is
        the same model at all times, by which steps of unlike loads are compared."""
        num_rows = num_prompt_rows = num_decoding = num_tokens = 0
        for item, tree, path in zip(begun.items, trees, paths, strict=True):
            if item.is_priced and path is not None:
                num_rows += tree.num_nodes
                num_decoding += 1
                num_tokens += len(path.token_ids)
            elif item.num_rows == 1 and item.is_forced:
                return
            else:
                num_prompt_rows += item.num_rows
        prompts_s = cost.prompts_s(num_rows, num_prompt_rows) if num_prompt_rows else 0.0
        if not num_decoding or prompts_s > _MOST_PROMPTS * took_s:
            return
        has_trees = num_rows > num_decoding
        kind = StepKind.HEAD if begun.num_draft_rows else StepKind.LOOKUP if has_trees else StepKind.PLAIN
        # Where some rest, a plain step would have served them too: the step is one of several that serve all.
        num_all = num_decoding + begun.num_resting
        num_steps = num_all / num_decoding
        plain_s = measured.plain_s(num_all, begun.num_context_tokens + begun.num_resting_context_tokens)
        took = num_steps * (took_s - prompts_s) / max(plain_s, _LEAST_S)
        self.observe(kind, num_all, num_steps * num_tokens, took, num_like_it=begun.num_steps)

    def observe(
        self, kind: StepKind, num_decoding: int, num_tokens: float, took: float, *, num_like_it: int = 1
    ) -> None:
        """Counts one step.

        Args:
            kind: what it did.
            num_decoding: requests.
            num_tokens: that it gave all of them together.
            took: its seconds, without those that went into prompts, over those foretold of a plain step.
            num_like_it: steps that went by with it, itself included.
        """
        load = _load(num_decoding)
        for (_, other), record in self._records.items():
            if other == load:
                record.age += num_like_it
                record.pause = max(0, record.pause - num_like_it)
        record = self._record(kind, load)
        record.age = 0
        if record.num >= 2:
            took = min(took, _MOST * record.time / record.num)
        record.tokens = _FADE * record.tokens + num_tokens / num_decoding
        record.time = _FADE * record.time + took
        record.num = _FADE * record.num + 1.0
        if kind is not StepKind.PLAIN:
            self._judge(record, self._record(StepKind.PLAIN, load), num_decoding)

    def allows(self, kind: StepKind, num_decoding: int) -> bool:
        """False while a kind is left out at a load."""
        return self._record(kind, _load(num_decoding)).pause == 0

    def is_ahead(self, kind: StepKind, num_decoding: int) -> bool:
        """True where enough steps of a kind were timed at a load, and kept the pace that they must."""
        load = _load(num_decoding)
        record, plain = self._record(kind, load), self._record(StepKind.PLAIN, load)
        enough = max(_LEAST_JUDGED, _NUM_JUDGED // num_decoding)
        is_known = record.num >= _decayed(enough) and plain.num >= _decayed(_NUM_PLAIN)
        return is_known and record.pace >= _LEAST_GAIN * plain.pace

    def wants_plain(self, num_decoding: int) -> bool:
        """True when the pace of plain steps at a load is not known, or was last seen long ago."""
        load = _load(num_decoding)
        plain = self._record(StepKind.PLAIN, load)
        others = [self._record(kind, load) for kind in (StepKind.HEAD, StepKind.LOOKUP)]
        if plain.num < _decayed(_NUM_PLAIN):
            return max(other.num for other in others) >= _LEAST_JUDGED / 2
        is_near = max(other.pace for other in others) < _NEAR * plain.pace
        return plain.age >= (_PLAIN_OFTEN if is_near else _PLAIN_EVERY)

    def _judge(self, record: _Record, plain: _Record, num_decoding: int) -> None:
        needed = max(_LEAST_JUDGED, _NUM_JUDGED // num_decoding)
        if record.num < _decayed(needed) or plain.num < 1.0:
            return
        chance = (_TOKEN_SPREAD / num_decoding + _TIME_SPREAD) / record.num + _TIME_SPREAD / plain.num
        if record.pace * (1.0 + _NUM_ERRORS * math.sqrt(chance)) >= _LEAST_GAIN * plain.pace:
            record.is_doubted = False
            if record.pace > 1.1 * plain.pace:
                record.next_pause = _FIRST_PAUSE
            return
        if record.is_doubted:
            record.pause, record.next_pause = record.next_pause, min(2 * record.next_pause, _LONGEST_PAUSE)
        else:
            # The machine may have been slow while only this kind was timed: both are timed anew, beside each other.
            plain.forget()
        record.is_doubted = not record.is_doubted
        record.forget()

    def _record(self, kind: StepKind, load: int) -> _Record:
        return self._records.setdefault((kind, load), _Record())


def _decayed(num: int) -> float:
    """Weight of so many observations."""
    return (1.0 - _FADE**num) / (1.0 - _FADE) - 1e-9


def _load(num_decoding: int) -> int:
    # Wider ranges would have what pays at their lower end speak for their upper one, where it may not.
    return round(3 * math.log2(num_decoding))
