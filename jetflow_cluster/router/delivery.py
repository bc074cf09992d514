"""What one request gave its client so far, and what it is to ask a replica for next. Does no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb


class ReplicaFaultError(RuntimeError):
    """A replica said what cannot be right: its part of the request does not count from here on."""


class Delivery:
    """The tokens of one request over as many replicas as it takes.

    A replica that takes over gets, as prior output, the client's own prior tokens and all that was delivered. The
    noise is keyed by seed and position, so the tokens go on as they would have. The text does too: which characters
    are certain behind a token is a function of the prompt and the tokens up to it, and the replica replays prior
    tokens through its detokenizer. What the lost replica held back (half a character, or what could become a stop
    string) is thereby held back in the new one, and comes with the token that makes it certain. Only what a replica
    flushes because it fails would come twice; it is in deltas without tokens, which are kept back until `finish`.

    Args:
        message: the client's request.
        prompt_token_ids: what its input was encoded to.
        seed: of the noise.
    """

    def __init__(self, message: pb.GenerateRequest, prompt_token_ids: Sequence[int], seed: int):
        self.prompt_token_ids, self.seed = prompt_token_ids, seed
        #: Whether the client was told that the request runs, and how often a replica took over since.
        self.has_begun = False
        self.num_resumes = 0
        #: How the output so far was computed; empty where there is none, or nobody said.
        self.arithmetic = message.arithmetic if message.sampling.prior_output_token_ids else ""
        self._sampling = pb.SamplingParams()
        self._sampling.CopyFrom(message.sampling)
        self._sampling.seed = seed
        self._wants_logprobs = message.sampling.HasField("logprobs")
        #: Output so far, the client's prior tokens included.
        self._token_ids = list(message.sampling.prior_output_token_ids)
        self._num_prior = len(self._token_ids)
        self._flushed = ""
        #: Of the present replica: known tokens that it has still to repeat, and whether there were any.
        self._num_repeated, self._repeats = 0, False
        #: Guessed tokens of each delta of the present replica, and statistics of the replicas before it.
        self._accepted: list[int] = []
        self._lost_stats = pb.SpeculationStats()

    @property
    def num_output(self) -> int:
        """Output tokens so far, prior ones included; the offset of the next delta."""
        return len(self._token_ids)

    @property
    def num_delivered(self) -> int:
        """Tokens that the client was given."""
        return len(self._token_ids) - self._num_prior

    @property
    def token_ids(self) -> Sequence[int]:
        """Output so far, prior tokens included."""
        return self._token_ids

    def num_tokens(self, max_model_len: int) -> int:
        """Prompt and most output tokens, counted by a model's longest sequence (0: not known)."""
        longest = len(self.prompt_token_ids) + self._max_tokens
        return min(longest, max_model_len) if max_model_len else longest

    def submit(self, wire_id: str, *, timeout_s: float | None, max_model_len: int) -> rpb.Submit:
        """What a replica is asked for: everything, or to go on.

        Args:
            wire_id: the request's name on the replica.
            timeout_s: seconds left; None is no limit.
            max_model_len: of the replica's model; 0 is not known.
        """
        known = self._token_ids
        num_room = self._max_tokens
        if max_model_len:
            num_room = min(num_room, max_model_len - len(self.prompt_token_ids))
        # All tokens came, but not how they ended: the last one is asked for again, and the end comes with it.
        self._repeats = self.num_delivered > 0 and len(known) >= num_room
        self._num_repeated = int(self._repeats)
        self.num_resumes += self.has_begun
        submit = rpb.Submit(request_id=wire_id, token_ids=self.prompt_token_ids, sampling=self._sampling)
        if self.num_delivered:
            del submit.sampling.prior_output_token_ids[:]
            submit.sampling.prior_output_token_ids.extend(known[: len(known) - self._num_repeated])
        if timeout_s is not None:
            submit.timeout_ms = max(1, min(math.ceil(timeout_s * 1e3), 2**32 - 1))
        return submit

    def lost(self) -> None:
        """The replica is gone; what it delivered counts, and what it held back does not.

        Statistics that it would have told at the end are taken from its deltas. The first one came from the prompt; the
        nodes that it guessed in vain are not known, and are left out.
        """
        self._fold_stats()
        self._flushed = ""

    def take(self, delta: pb.Delta) -> pb.Delta | None:
        """What of a replica's delta is news to the client.

        Raises:
            ReplicaFaultError: it does not begin where the last one ended, or lacks what was asked for.
        """
        count = len(delta.token_ids)
        if not count:
            # Behind a repeated token all text is told.
            self._flushed += "" if self._repeats else delta.text
            return None
        expected = len(self._token_ids) - self._num_repeated
        if delta.seq_offset != expected:
            raise ReplicaFaultError(f"a delta begins at token {delta.seq_offset} and not at {expected}")
        if self._wants_logprobs and len(delta.logprobs) != count:
            raise ReplicaFaultError(f"{len(delta.logprobs)} log-probabilities came for {count} tokens")
        if self._num_repeated:
            self._check_repeated(delta)
            return None
        self._token_ids.extend(delta.token_ids)
        self._accepted.append(delta.num_accepted)
        if self._flushed:
            delta.text, self._flushed = self._flushed + delta.text, ""
        return delta

    def finish(self, finished: pb.Finished) -> list[pb.GenerateEvent]:
        """The last events: text that the end made certain, if it is not told yet, and how the request ended.

        Raises:
            ReplicaFaultError: the replica counts other tokens than came.
        """
        count, expected = finished.usage.completion_tokens, len(self._token_ids) - self._num_repeated
        if count != expected:
            raise ReplicaFaultError(f"{expected} tokens came, and the replica counts {count}")
        finished.num_resumes = self.num_resumes
        finished.usage.completion_tokens = self.num_output
        if self.num_resumes:
            finished.speculation.CopyFrom(_sum(self._lost_stats, finished.speculation))
        return [*self._last_text(), pb.GenerateEvent(finished=finished)]

    def aborted(self) -> list[pb.GenerateEvent]:
        """The last events of an aborted request whose replica did not say them."""
        self._fold_stats()
        finished = pb.Finished(
            finish_reason=pb.FINISH_REASON_ABORT,
            usage=pb.Usage(prompt_tokens=len(self.prompt_token_ids), completion_tokens=self.num_output),
            speculation=self._lost_stats,
            num_resumes=self.num_resumes,
        )
        return [*self._last_text(), pb.GenerateEvent(finished=finished)]

    @property
    def _max_tokens(self) -> int:
        # The default is that of `SamplingParams`.
        return self._sampling.max_tokens if self._sampling.HasField("max_tokens") else 16

    def _check_repeated(self, delta: pb.Delta) -> None:
        if list(delta.token_ids) != self._token_ids[-self._num_repeated :]:
            raise ReplicaFaultError("a token differs from the one that was delivered")
        # Its text came before: a delta that reaches the limit holds nothing back.
        self._num_repeated = 0

    def _last_text(self) -> list[pb.GenerateEvent]:
        text, self._flushed = self._flushed, ""
        return [pb.GenerateEvent(delta=pb.Delta(seq_offset=self.num_output, text=text))] if text else []

    def _fold_stats(self) -> None:
        stats = pb.SpeculationStats()
        for num_accepted in self._accepted[1:]:
            stats.num_spec_steps += 1
            stats.num_draft_nodes += num_accepted
            stats.num_accepted_draft_tokens += num_accepted
            _widen(stats, num_accepted + 1)
            stats.acceptance_histogram[num_accepted] += 1
        self._accepted.clear()
        self._lost_stats = _sum(self._lost_stats, stats)


def _sum(first: pb.SpeculationStats, second: pb.SpeculationStats) -> pb.SpeculationStats:
    total = pb.SpeculationStats()
    for name in ("num_spec_steps", "num_draft_nodes", "num_accepted_draft_tokens"):
        setattr(total, name, getattr(first, name) + getattr(second, name))
    for stats in (first, second):
        _widen(total, len(stats.acceptance_histogram))
        for index, count in enumerate(stats.acceptance_histogram):
            total.acceptance_histogram[index] += count
    if total.num_spec_steps:
        total.mean_acceptance_length = 1.0 + total.num_accepted_draft_tokens / total.num_spec_steps
    return total


def _widen(stats: pb.SpeculationStats, length: int) -> None:
    stats.acceptance_histogram.extend([0] * (length - len(stats.acceptance_histogram)))
