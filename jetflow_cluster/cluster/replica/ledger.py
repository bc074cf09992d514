"""The requests that a step loop has, and what is still to be computed for them."""

from __future__ import annotations

from collections.abc import Iterable

from jetflow_cluster.cluster.replica.meter import StepCounts
from jetflow_cluster.cluster.replica.rates import RateMeter, Rates, RecentWaits
from jetflow_cluster.cluster.replica.ticket import Ticket, TicketUpdate
from jetflow_cluster.engine.request import RequestStatus
from jetflow_cluster.types import FinishReason, RequestDelta


class TicketLedger:
    """Written by one thread; `outstanding_tokens` and `rates` may be read by any."""

    def __init__(self, now_s: float) -> None:
        #: Prompt and output tokens still to be computed, at most.
        self.outstanding_tokens = 0
        #: All that steps did, and how long requests waited for a first token in the last seconds.
        self.counts = StepCounts()
        self.waits = RecentWaits()
        self._tickets: dict[str, Ticket] = {}
        #: Those that were not scheduled yet, in the order of arrival.
        self._unscheduled: dict[str, Ticket] = {}
        self._meter = RateMeter(now_s)

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, key: str) -> bool:
        return key in self._tickets

    def tickets(self) -> list[Ticket]:
        """All of them."""
        return list(self._tickets.values())

    def time_to_first_token_s(self, now_s: float) -> float:
        """What requests waited for a first token lately, and what the first that waits has waited so far."""
        waiting = next(iter(list(self._unscheduled.values())[:1]), None)
        return max(self.waits.p90(now_s), 0.0 if waiting is None else now_s - waiting.arrived_s)

    def rates(self, now_s: float) -> Rates:
        """Of the last seconds."""
        return self._meter.rates(now_s)

    def add(self, ticket: Ticket) -> None:
        """Takes a request in."""
        request = ticket.request
        num_prompt = len(request.prompt_token_ids)
        ticket.tokens_left = num_prompt + min(request.params.max_tokens, request.max_len - num_prompt)
        self.outstanding_tokens += ticket.tokens_left
        self._tickets[ticket.key] = self._unscheduled[ticket.key] = ticket

    def note_scheduled(self, now_s: float) -> None:
        """Behind a step that began at `now_s`: notes which requests it was the first for."""
        while self._unscheduled:
            # Admission follows the order of arrival: behind the first that waits nobody was admitted.
            key, ticket = next(iter(self._unscheduled.items()))
            if ticket.request.status is RequestStatus.WAITING and ticket.request.finish_reason is None:
                return
            ticket.scheduled_s = now_s
            del self._unscheduled[key]

    def note_deltas(self, deltas: Iterable[RequestDelta], now_s: float) -> list[TicketUpdate]:
        """Counts what a step said of the requests; those that ended are let go."""
        updates = []
        num_tokens = num_steps = num_accepted = 0
        for delta in deltas:
            ticket = self._tickets.get(delta.request_id)
            if ticket is None:
                continue
            updates.append(TicketUpdate(ticket=ticket, delta=delta))
            num_tokens += len(delta.token_ids)
            self._note_tokens(ticket, len(delta.token_ids), now_s)
            done = ticket.request.speculation
            if done.num_steps > ticket.num_counted_steps:
                num_steps += 1
                num_accepted += delta.num_accepted
                self.counts.note_step(done.num_draft_nodes - ticket.num_counted_nodes, delta.num_accepted)
            ticket.num_counted_steps, ticket.num_counted_nodes = done.num_steps, done.num_draft_nodes
            if delta.finish_reason is not None:
                self._let_go(ticket, now_s)
        if num_tokens:
            self._meter.add(now_s, num_tokens=num_tokens, num_steps=num_steps, num_accepted=num_accepted)
        return updates

    def end(self, ticket: Ticket, reason: FinishReason, now_s: float) -> TicketUpdate:
        """Lets a request go of which the engine says no more."""
        self._let_go(ticket, now_s)
        offset = ticket.request.num_output
        delta = RequestDelta(request_id=ticket.key, offset=offset, token_ids=[], text="", finish_reason=reason)
        return TicketUpdate(ticket=ticket, delta=delta)

    def _note_tokens(self, ticket: Ticket, count: int, now_s: float) -> None:
        if not count:
            return
        self.counts.num_tokens += count
        if ticket.first_token_s is None:
            ticket.first_token_s = now_s
            self.waits.add(now_s, now_s - ticket.arrived_s)
            request = ticket.request
            self.counts.num_prompt_tokens += len(request.prompt_token_ids)
            self.counts.num_cached_tokens += request.usage.cached_tokens
            count += len(request.prompt_token_ids) + len(request.params.prior_output_token_ids)
        self._settle(ticket, min(count, ticket.tokens_left))

    def _let_go(self, ticket: Ticket, now_s: float) -> None:
        ticket.ended_s = now_s
        self._settle(ticket, ticket.tokens_left)
        self._tickets.pop(ticket.key, None)
        self._unscheduled.pop(ticket.key, None)

    def _settle(self, ticket: Ticket, count: int) -> None:
        ticket.tokens_left -= count
        self.outstanding_tokens -= count
