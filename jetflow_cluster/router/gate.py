"""The gate before every call, whatever protocol it came by: who calls, and whether they may do so now."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from jetflow_cluster.router.callers import Caller, Limits, TokenFile
from jetflow_cluster.router.token_bucket import Bucket
from jetflow_cluster.rpc.errors import StatusError

#: Seconds after which a caller with too many calls under way may try again.
_RETRY_S = 1.0


class _Use:
    """What one caller uses."""

    def __init__(self, limits: Limits, now: float):
        self.num_running = 0
        self.requests = Bucket.full(limits.requests_per_s, now) if limits.requests_per_s is not None else None
        self.tokens = Bucket.full(limits.tokens_per_s, now) if limits.tokens_per_s is not None else None
        self.limits = limits


class Gate:
    """Lets calls in, and counts what they use. Belongs to one event loop.

    Args:
        tokens: who may call; None is anybody, and all are one caller.
        limits: of callers without a token.
        clock: seconds.
    """

    def __init__(self, tokens: TokenFile | None, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._tokens, self._clock = tokens, clock
        self._anybody = Caller(name="", limits=limits)
        self._uses: dict[str, _Use] = {}

    def identify(self, authorization: str | None) -> Caller:
        """Who calls.

        Raises:
            StatusError: UNAUTHENTICATED.
        """
        if self._tokens is None:
            return self._anybody
        caller = self._tokens.caller(authorization)
        if caller is None:
            raise StatusError.unauthenticated("a known token must be given, as authorization: Bearer <token>")
        return caller

    @contextlib.contextmanager
    def enter(self, authorization: str | None) -> Iterator[Caller]:
        """A call from its beginning to its end.

        Raises:
            StatusError: UNAUTHENTICATED, or RESOURCE_EXHAUSTED with a hint when to try again.
        """
        caller = self.identify(authorization)
        use = self._use(caller)
        self._check(use)
        use.num_running += 1
        if use.requests is not None:
            use.requests = use.requests.less(1, self._clock())
        undo = _charge.set(lambda num_tokens: self._take_tokens(use, num_tokens))
        try:
            yield caller
        finally:
            _charge.reset(undo)
            use.num_running -= 1

    def _use(self, caller: Caller) -> _Use:
        use = self._uses.get(caller.name)
        if use is None or use.limits != caller.limits:
            # With new limits the allowance begins anew; what runs still counts.
            fresh = _Use(caller.limits, self._clock())
            if use is None:
                use = self._uses[caller.name] = fresh
            else:
                use.limits, use.requests, use.tokens = fresh.limits, fresh.requests, fresh.tokens
        return use

    def _check(self, use: _Use) -> None:
        limits, now = use.limits, self._clock()
        if limits.max_concurrent is not None and use.num_running >= limits.max_concurrent:
            message = f"{use.num_running} calls are under way: at most {limits.max_concurrent:g}"
            raise StatusError.resource_exhausted(message, _RETRY_S)
        if use.requests is not None and (wait_s := use.requests.wait_s(1, now)):
            message = f"too many calls: at most {limits.requests_per_s:g} per second"
            raise StatusError.resource_exhausted(message, wait_s)
        if use.tokens is not None and (wait_s := use.tokens.wait_s(1, now)):
            message = f"too many tokens: at most {limits.tokens_per_s:g} per second"
            raise StatusError.resource_exhausted(message, wait_s)

    def _take_tokens(self, use: _Use, num_tokens: int) -> None:
        if use.tokens is not None:
            use.tokens = use.tokens.less(num_tokens, self._clock())


def _nobody(num_tokens: int) -> None:
    """Counts nothing: the call did not come through a gate."""


_charge: ContextVar[Callable[[int], None]] = ContextVar("charge", default=_nobody)


def charge() -> Callable[[int], None]:
    """Counts tokens for the caller of the present task."""
    return _charge.get()
