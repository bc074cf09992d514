"""What is measured while a model is served: the catalogue, and how values are told. Knows no library of metrics.

Names have the suffixes of vLLM's, so that its dashboards fit behind a change of prefix. On Ray they are exported as
``ray_<name>``, counters with ``_total`` behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
_BETWEEN_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One entry of the catalogue."""

    name: str
    kind: str
    description: str
    labels: tuple[str, ...] = ()
    #: Upper bounds of a histogram's buckets, ascending, the last one open.
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus, of a histogram without the suffix of its parts."""
        return f"ray_{self.name}" + ("_total" if self.kind == COUNTER else "")


class Metrics(Protocol):
    """Takes values, from any thread, without waiting."""

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Counts."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """The present value of a gauge."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """One observation of a histogram."""


class NoMetrics:
    """Tells nobody."""

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """See `Metrics`."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """See `Metrics`."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """See `Metrics`."""


def _counter(name: str, description: str, *labels: str) -> Metric:
    return Metric(name=f"jetflow_{name}", kind=COUNTER, description=description, labels=labels)


def _gauge(name: str, description: str, *labels: str) -> Metric:
    return Metric(name=f"jetflow_{name}", kind=GAUGE, description=description, labels=labels)


def _histogram(name: str, description: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=f"jetflow_{name}", kind=HISTOGRAM, description=description, buckets=buckets)


# By routers: what clients see.
TIME_TO_FIRST_TOKEN = _histogram("time_to_first_token_seconds", "From arrival to the first delta.", _LATENCY_S)
INTER_TOKEN_LATENCY = _histogram(
    "inter_token_latency_seconds", "From one delta to the next, by the tokens of the latter.", _BETWEEN_S
)
E2E_LATENCY = _histogram("e2e_request_latency_seconds", "From arrival to the end of a request.", _LATENCY_S)
QUEUE_TIME = _histogram("request_queue_time_seconds", "Waiting in router and replica for a place.", _LATENCY_S)
REQUEST_SUCCESS = _counter("request_success", "Requests that finished, by reason.", "finished_reason")
REQUEST_FAILURES = _counter("request_failures", "Requests that ended with a status, by its code.", "code")
REQUEST_CANCELS = _counter(
    "request_cancels", "Requests ended by client (the call), abort (by id) or deadline.", "cause"
)
REQUEST_RESUMES = _counter("request_resumes", "Times that another replica took a request over.")
PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens of finished requests.")
GENERATION_TOKENS = _counter("generation_tokens", "Tokens that clients were given.")
ROUTER_RUNNING = _gauge("router_num_requests_running", "Requests of a router that run or wait.")
ROUTER_WAITING = _gauge("router_num_requests_waiting", "Requests that wait in a router.")
ROUTER_WAITING_TOKENS = _gauge("router_num_tokens_waiting", "Their tokens, output still to come counted.")
ROUTER_REPLICAS = _gauge("router_num_replicas", "Replicas that a router can send requests to.")

# By replicas: what the engine does.
RUNNING = _gauge("num_requests_running", "Requests in the batch.")
WAITING = _gauge("num_requests_waiting", "Requests that wait for pages or room in the batch.")
OUTSTANDING_TOKENS = _gauge("num_tokens_outstanding", "Prompt and output tokens still to be computed, at most.")
KV_USAGE = _gauge("kv_cache_usage_perc", "Share of pages that requests use, 0 to 1.")
KV_CACHED = _gauge("kv_cache_cached_perc", "Share of pages that are kept for prefixes, 0 to 1.")
PREFIX_QUERIES = _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
PREFIX_HITS = _counter("prefix_cache_hits", "Prompt tokens found there.")
PREEMPTIONS = _counter("num_preemptions", "Requests that gave their pages back and are computed again.")
STEPS = _counter("engine_steps", "Steps of the engine.")
REPLICA_TOKENS = _counter("engine_generation_tokens", "Tokens that the engine made.")
NUM_DRAFTS = _counter("spec_decode_num_drafts", "Trees that were verified: one per request and step.")
NUM_DRAFT_TOKENS = _counter("spec_decode_num_draft_tokens", "Guessed nodes that were verified, roots not counted.")
NUM_ACCEPTED = _counter("spec_decode_num_accepted_tokens", "Guessed tokens that the target accepted.")
NUM_ACCEPTED_PER_POS = _counter(
    "spec_decode_num_accepted_tokens_per_pos", "Trees whose path was accepted to this depth at least.", "position"
)
NODES_VERIFIED = _counter("spec_decode_num_nodes_verified", "Rows of trees that were verified, roots included.")
TREE_BUDGET = _gauge("spec_decode_tree_budget", "Nodes per tree of the last half second, root included.")
POLICY_STEPS = _counter(
    "spec_decode_steps", "Steps, by why mode auto speculated in them or not: pays, load, pace, head, ...", "reason"
)
SPECULATING = _gauge("spec_decode_active", "1 while guesses are made, 0 while draft workers are away.")
STEP_TIME = _gauge("engine_step_age_seconds", "Seconds that the present step has taken so far.")

CATALOGUE: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
