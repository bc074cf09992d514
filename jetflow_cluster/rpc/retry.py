"""Which server is asked next, after what pause, and when it is enough. Does no I/O and does not sleep."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError

#: A call that ended with one of these, or with its connection, is sent again; so is, with what it delivered, a stream.
#: A server that is killed or stopped ends its calls with UNAVAILABLE.
RETRIED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})
# A pause that the server asked for is never shortened; the others are, so that clients do not come back together.
_SHORTEST, _LONGEST_ASKED = 0.5, 1.25


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How a client goes on when a server or a connection fails."""

    #: Times that a call is sent again before it told anything; 0 never.
    max_retries: int = 3
    #: Seconds before the first of them; doubled each time, and cut by up to a half at random.
    initial_backoff_s: float = 0.05
    #: Longest such pause, in seconds.
    max_backoff_s: float = 2.0
    #: Seconds, from a break on, in which a stream that has delivered must deliver again; 0 never resumes.
    resume_timeout_s: float = 30.0
    #: Seconds that a server that failed is asked last.
    quarantine_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_retries <= 10:
            raise ValueError(f"max_retries = {self.max_retries}: must be in [0, 10]")
        if not 0 < self.initial_backoff_s <= self.max_backoff_s:
            given = f"initial_backoff_s = {self.initial_backoff_s}, max_backoff_s = {self.max_backoff_s}"
            raise ValueError(f"{given}: must be above 0, the first no longer than the last")
        for name in ("resume_timeout_s", "quarantine_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")

    def backoff_s(self, num_failures: int, retry_after_s: float | None) -> float:
        """Seconds to wait behind so many failures in a row (at least 1)."""
        if retry_after_s is not None:
            return retry_after_s * random.uniform(1.0, _LONGEST_ASKED)
        doubled = self.initial_backoff_s * 2.0 ** min(num_failures - 1, 30)
        return min(self.max_backoff_s, doubled) * random.uniform(_SHORTEST, 1.0)


class Servers:
    """The addresses that a client knows. Calls take turns; one that failed is asked last for a while.

    Safe to use from several threads.
    """

    def __init__(self, addresses: str | Sequence[str], *, quarantine_s: float):
        found = [addresses] if isinstance(addresses, str) else list(addresses)
        if not found or not all(isinstance(address, str) and address for address in found):
            raise ValueError(f"servers = {addresses!r}: must be one or more addresses such as host:9000")
        self.addresses = tuple(dict.fromkeys(found))
        self._quarantine_s = quarantine_s
        self._turns = itertools.count()
        self._failed_at: dict[str, float] = {}

    def choose(self) -> str:
        """The address that the next call should go to."""
        turn = next(self._turns) % len(self.addresses)
        order = self.addresses[turn:] + self.addresses[:turn]
        now = time.monotonic()
        healthy = [a for a in order if now - self._failed_at.get(a, -float("inf")) >= self._quarantine_s]
        return healthy[0] if healthy else min(order, key=lambda address: self._failed_at[address])

    def failed(self, address: str) -> None:
        """Notes that a call to the address failed just now."""
        self._failed_at[address] = time.monotonic()


class Attempts:
    """The calls that one operation takes.

    Args:
        policy: how often and how fast to try again.
        servers: where.
        timeout_s: seconds for all of it; None is no limit.
    """

    def __init__(self, policy: RetryPolicy, servers: Servers, timeout_s: float | None):
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s = {timeout_s}: must be above 0")
        self._policy, self._servers = policy, servers
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._has_progressed = False
        self._num_failures = 0
        self._failing_since = 0.0
        self.address = servers.choose()

    @property
    def timeout_s(self) -> float | None:
        """Seconds left; None is no limit.

        Raises:
            StatusError: none is left.
        """
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise StatusError.deadline_exceeded("the deadline passed")
        return left

    def progressed(self) -> None:
        """Notes that the present call delivered something that must not be asked for again."""
        self._has_progressed = True
        self._num_failures = 0

    def pause_s(self, error: StatusError | InvalidFieldsError) -> float:
        """Seconds to wait before the next call, which goes to `address`; the present one ended with `error`, and not
        because the caller cancelled it.

        Raises:
            StatusError: `error`, when there is to be no further call.
            InvalidFieldsError: the same.
        """
        if not isinstance(error, StatusError):
            raise error
        now = time.monotonic()
        if self._num_failures == 0:
            self._failing_since = now
        self._num_failures += 1
        pause_s = self._policy.backoff_s(self._num_failures, error.retry_after_s)
        if self._has_progressed:
            may_go_on = now + pause_s <= self._failing_since + self._policy.resume_timeout_s
        else:
            may_go_on = self._num_failures <= self._policy.max_retries
        is_in_time = self._deadline is None or now + pause_s < self._deadline
        is_passing = error.code in RETRIED or error.is_lost_connection
        if not is_passing or not may_go_on or not is_in_time:
            raise error
        self._servers.failed(self.address)
        self.address = self._servers.choose()
        return pause_s
