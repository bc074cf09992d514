"""From an engine's counters to metrics, a few times a second."""

from __future__ import annotations

from dataclasses import dataclass, field

from jetflow_cluster import metrics as m
from jetflow_cluster.cluster.replica.ticket import LoopLoad
from jetflow_cluster.metrics import Metric, Metrics


@dataclass(kw_only=True)
class StepCounts:
    """What steps did so far; written by one thread, and read by any."""

    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    #: Trees, guessed nodes in them (roots not counted), and guesses that were accepted.
    num_drafts: int = 0
    num_draft_nodes: int = 0
    num_accepted: int = 0
    #: Steps of requests, those with a bare root included.
    num_request_steps: int = 0
    #: Trees whose path was accepted to depth i + 1 at least.
    accepted_per_position: list[int] = field(default_factory=list)

    def note_step(self, num_draft_nodes: int, num_accepted: int) -> None:
        """Counts one request's verification."""
        self.num_request_steps += 1
        if not num_draft_nodes:
            return
        self.num_drafts += 1
        self.num_draft_nodes += num_draft_nodes
        self.num_accepted += num_accepted
        missing = num_accepted - len(self.accepted_per_position)
        if missing > 0:
            self.accepted_per_position += [0] * missing
        for i in range(num_accepted):
            self.accepted_per_position[i] += 1


class ReplicaMeter:
    """Tells metrics what changed since the last time. One thread."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._told: dict[tuple[Metric, str], int] = {}

    def tell(self, load: LoopLoad, counts: StepCounts, *, is_speculating: bool, step_age_s: float) -> None:
        """Sets the gauges, and adds to the counters."""
        stats, gauge = load.stats, self._metrics.set
        gauge(m.RUNNING, stats.num_running)
        gauge(m.WAITING, stats.num_waiting)
        gauge(m.OUTSTANDING_TOKENS, load.outstanding_tokens)
        gauge(m.KV_USAGE, stats.num_used_pages / stats.num_pages)
        gauge(m.KV_CACHED, stats.num_cached_pages / stats.num_pages)
        gauge(m.SPECULATING, float(is_speculating))
        gauge(m.STEP_TIME, step_age_s)
        trees = self._add(m.NUM_DRAFTS, counts.num_drafts)
        nodes = self._add(m.NUM_DRAFT_TOKENS, counts.num_draft_nodes)
        steps = counts.num_request_steps
        rows = self._add(m.NODES_VERIFIED, steps + counts.num_draft_nodes)
        # Without a tree a request's step has one row, so the quotient is what a request got on average.
        gauge(m.TREE_BUDGET, rows / (rows - nodes) if rows > nodes else 0.0)
        if trees:
            for i, count in enumerate(list(counts.accepted_per_position)):
                self._add(m.NUM_ACCEPTED_PER_POS, count, position=str(i))
        self._add(m.NUM_ACCEPTED, counts.num_accepted)
        self._add(m.REPLICA_TOKENS, counts.num_tokens)
        self._add(m.PREFIX_QUERIES, counts.num_prompt_tokens)
        self._add(m.PREFIX_HITS, counts.num_cached_tokens)
        if num_steps := self._add(m.STEPS, stats.num_steps):
            self._metrics.add(m.POLICY_STEPS, num_steps, reason=stats.speculation_reason)
        self._add(m.PREEMPTIONS, stats.num_preemptions)

    def _add(self, metric: Metric, total: int, **labels: str) -> int:
        key = (metric, "".join(labels.values()))
        change = total - self._told.get(key, 0)
        self._told[key] = total
        if change:
            self._metrics.add(metric, change, **labels)
        return change
