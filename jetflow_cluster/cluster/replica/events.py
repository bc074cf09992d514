"""From what a step loop reports to what a router is told."""

from __future__ import annotations

from jetflow_cluster.cluster.replica.ticket import LoopLoad, LoopState, Ticket, TicketUpdate
from jetflow_cluster.engine.protocols import Drafter
from jetflow_cluster.engine.remote_drafter import RemoteDrafter
from jetflow_cluster.rpc.convert import delta_to_proto, finished_to_proto
from jetflow_cluster.rpc.errors import shorten
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb
from jetflow_cluster.types import FinishReason, InvalidRequestError

#: Bytes of an event beside its lists and text, at most: ids, offsets, usage, timing.
_EVENT_BYTES = 512
#: Bytes of one log-probability with its token, at most.
_LOGPROB_BYTES = 20
#: Bytes of a node of a tree, at most.
_NODE_BYTES = 16


def events_of(request_id: str, update: TicketUpdate) -> list[rpb.ReplicaEvent]:
    """What a router is told of one request's part of a step.

    A request that failed is refused, so that another replica takes it: what its tokens held back of the text is not
    told, for the other replica will.
    """
    delta, request = update.delta, update.ticket.request
    if delta.finish_reason is FinishReason.ERROR:
        return [refused(request_id, rpb.REFUSAL_CODE_INTERNAL)]
    events = []
    if delta.token_ids or delta.text:
        events.append(rpb.ReplicaEvent(request_id=request_id, delta=delta_to_proto(delta)))
    if delta.finish_reason is not None:
        finished = finished_to_proto(request.output(), timing_of(update.ticket))
        events.append(rpb.ReplicaEvent(request_id=request_id, finished=finished))
    return events


def refused(request_id: str, code: rpb.RefusalCode, problem: InvalidRequestError | None = None) -> rpb.ReplicaEvent:
    """The last event of a request that this replica does not take, or does not finish."""
    refusal = rpb.Refused(request_id=request_id, code=code)
    if problem is not None:
        refusal.field, refusal.value, refusal.limit = problem.field, shorten(problem.value), problem.limit
    return rpb.ReplicaEvent(request_id=request_id, refused=refusal)


def timing_of(ticket: Ticket) -> pb.Timing:
    """Of a request that ended. What never came (a place in the batch, a first token) took as long as the request."""
    ended_s = ticket.ended_s if ticket.ended_s is not None else ticket.arrived_s

    def since_arrival(moment_s: float | None) -> float:
        return (moment_s if moment_s is not None else ended_s) - ticket.arrived_s

    return pb.Timing(
        queue_s=max(0.0, since_arrival(ticket.scheduled_s)),
        time_to_first_token_s=since_arrival(ticket.first_token_s),
        total_s=since_arrival(ended_s),
    )


def num_bytes_of(event: rpb.ReplicaEvent) -> int:
    """About how many bytes an event takes; never far below the truth, and found without writing it."""
    kind = event.WhichOneof("event")
    logprobs = event.delta.logprobs if kind == "delta" else event.finished.prompt_logprobs if kind == "finished" else ()
    total = _EVENT_BYTES
    if kind == "delta":
        total += 5 * len(event.delta.token_ids) + 4 * len(event.delta.text)
        if event.delta.HasField("tree"):
            total += _NODE_BYTES * len(event.delta.tree.parents)
    if logprobs:
        total += logprobs_bytes(len(logprobs), len(logprobs[0].top))
    return total


def logprobs_bytes(num_tokens: int, num_top: int) -> int:
    """Bytes of the log-probabilities of so many tokens, each with its best others, at most."""
    return num_tokens * (num_top + 1) * _LOGPROB_BYTES


def load_to_proto(load: LoopLoad, *, replica_id: str, drafter: Drafter | None) -> pb.ReplicaLoad:
    """A loop's load as routers are told it."""
    is_drafting = drafter.num_workers > 0 if isinstance(drafter, RemoteDrafter) else drafter is not None
    stats = load.stats
    return pb.ReplicaLoad(
        replica_id=replica_id,
        healthy=load.state in (LoopState.RUNNING, LoopState.DRAINING),
        draining=load.state in (LoopState.DRAINING, LoopState.STOPPED),
        speculating=is_drafting,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        outstanding_tokens=load.outstanding_tokens,
        num_pages=stats.num_pages,
        num_free_pages=stats.num_free_pages,
        num_cached_pages=stats.num_cached_pages,
        tokens_per_s=load.tokens_per_s,
        mean_acceptance_length=load.mean_acceptance_length,
    )


def is_news(before: pb.ReplicaLoad, now: pb.ReplicaLoad) -> bool:
    """Whether a load differs so much from the one that was told last that it should not wait."""
    for name in ("healthy", "draining", "speculating"):
        if getattr(before, name) != getattr(now, name):
            return True
    change = abs(now.outstanding_tokens - before.outstanding_tokens)
    return 4 * change > max(now.outstanding_tokens, before.outstanding_tokens)
