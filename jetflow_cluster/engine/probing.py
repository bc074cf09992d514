"""When to try again what did not pay: a probe is taken when a small share of the time that went by has paid for it."""

from __future__ import annotations

from collections.abc import Sequence

from jetflow_cluster.engine.request import Request

#: Share of the time that probes may take.
PROBE_SHARE = 0.01
#: Requests of one probe.
_NUM_REQUESTS = 4
#: Tokens of draft context that a request must have to be probed.
_NUM_CONTEXT_TOKENS = 12
#: Steps that are drafted in one probe, and the most that its contexts are waited for.
_NUM_DRAFTED = 4
_MOST_STEPS = 64
#: Seconds that may be saved up.
_MOST_CREDIT_S = 1.0


class Prober:
    """Tries drafting on a few requests. First their draft contexts are kept for some tokens, then they draft."""

    def __init__(self) -> None:
        self._credit_s = 0.0
        self._probed: list[Request] = []
        self._num_steps = self._num_drafted = 0
        #: Probes that were begun.
        self.num_probes = 0

    def earn(self, took_s: float) -> None:
        """A step went by."""
        self._credit_s = min(self._credit_s + PROBE_SHARE * took_s, _MOST_CREDIT_S)

    def stop(self) -> None:
        """Ends a probe that runs."""
        self._probed = []

    def probed(self, requests: Sequence[Request], price_s: float) -> list[Request]:
        """The requests that are being probed in this step; none while there is not the credit for it.

        Args:
            requests: those that might be.
            price_s: what a probe is expected to take, contexts included; paid as one begins.
        """
        running = {id(request) for request in requests}
        self._probed = [request for request in self._probed if id(request) in running]
        if self._probed and (self._num_drafted >= _NUM_DRAFTED or self._num_steps >= _MOST_STEPS):
            self._probed = []
        if not self._probed and self._credit_s >= price_s:
            # Those with the most left learn the most.
            able = [request for request in requests if request.room > _NUM_CONTEXT_TOKENS]
            self._probed = sorted(able, key=lambda request: -request.room)[:_NUM_REQUESTS]
            self._num_steps = self._num_drafted = 0
            if self._probed:
                self.num_probes += 1
                self._credit_s -= price_s
        self._num_steps += bool(self._probed)
        return self._probed

    def ready(self, needs_context: bool) -> list[Request]:
        """Those of the probed requests that draft in this step: all at once, so that a step less is paid for."""
        found = [r for r in self._probed if not needs_context or _has_context(r)]
        if len(found) == len(self._probed) or self._num_steps > _MOST_STEPS // 2:
            self._num_drafted += bool(found)
            return found
        return []


def _has_context(request: Request) -> bool:
    return request.has_draft_context and request.fused_len - request.draft_start >= _NUM_CONTEXT_TOKENS
