"""Who may begin: a bounded queue in the order of arrival, counted in tokens."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.rpc.errors import StatusError

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 60.0
#: Seconds over which the rate of service is taken, and the share of the latest measure in it.
_WINDOW_S, _SHARE = 1.0, 0.5


class Place(Protocol):
    """What a request holds while it runs."""

    def release(self) -> None:
        """Gives it back."""


PlaceT = TypeVar("PlaceT", bound=Place)


class ServiceRate:
    """Tokens per second that all replicas serve together, as seen while requests waited.

    Args:
        prior_per_replica: what one is thought to serve until it was measured.
    """

    def __init__(self, prior_per_replica: float):
        self._per_replica = prior_per_replica
        self._num_replicas = 1
        self._since: float | None = None
        self._num_freed = 0

    @property
    def tokens_per_s(self) -> float:
        """The rate."""
        return self._per_replica * self._num_replicas

    def set_replicas(self, count: int) -> None:
        """Notes how many replicas serve."""
        self._num_replicas = max(1, count)
        self._since = None

    def freed(self, num_tokens: int) -> None:
        """Counts tokens that need not be computed any more."""
        self._num_freed += num_tokens

    def look(self, now: float, is_saturated: bool) -> None:
        """Measures, if requests waited for a whole window."""
        if not is_saturated:
            self._since = None
        elif self._since is None:
            self._since, self._num_freed = now, 0
        elif now - self._since >= _WINDOW_S:
            seen = self._num_freed / (now - self._since) / self._num_replicas
            if seen > 0:
                self._per_replica += _SHARE * (seen - self._per_replica)
            self._since, self._num_freed = now, 0


class Waiter(Generic[PlaceT]):
    """One request that waits, or got its place."""

    def __init__(self, owner: Admission, num_tokens: int, place: Callable[[], PlaceT | None], queue: _Queue):
        self.num_tokens, self.place, self.queue = num_tokens, place, queue
        #: Ends the waiting when no replica comes back in time.
        self.timer: asyncio.TimerHandle | None = None
        self._owner = owner
        self._placed: asyncio.Future[PlaceT] = asyncio.get_running_loop().create_future()

    async def wait(self) -> PlaceT:
        """The place. When this is cancelled, the place goes back, or the request leaves the queue.

        Raises:
            StatusError: the request was refused.
        """
        try:
            return await self._placed
        except asyncio.CancelledError:
            self._owner.leave(self)
            # The place may have come in the same moment.
            if not self._placed.cancelled() and self._placed.done() and self._placed.exception() is None:
                self._placed.result().release()
            raise

    def give(self, place: PlaceT) -> None:
        """Ends the waiting; a place that nobody waits for any more goes back."""
        if self._placed.done():
            place.release()
        else:
            self._placed.set_result(place)

    def refuse(self, error: Exception) -> None:
        """Ends the waiting with an error, unless it has ended."""
        self._owner.leave(self)
        if not self._placed.done():
            self._placed.set_exception(error)
            # Whoever was to hear of it may be gone.
            self._placed.exception()


class _Queue(OrderedDict[int, Waiter[Any]]):
    """Waiters in their order, and the tokens of all of them."""

    num_tokens = 0


class Admission:
    """Gives places in the order of arrival; requests that ran before go first.

    Args:
        config: of the router.
        clock: seconds.
    """

    def __init__(self, config: RouterConfig, clock: Callable[[], float] = time.monotonic):
        self._config, self._clock = config, clock
        self._new, self._begun = _Queue(), _Queue()
        self._num_serving = 0
        self._is_pumping = False
        self.rate = ServiceRate(config.prior_tokens_per_s)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._new) + len(self._begun)

    @property
    def num_tokens(self) -> int:
        """Tokens of the requests that wait for the first time."""
        return self._new.num_tokens

    def enter(
        self, num_tokens: int, place: Callable[[], PlaceT | None], *, deadline: float | None = None
    ) -> Waiter[PlaceT]:
        """Appends a new request, or gives it a place at once.

        Args:
            num_tokens: prompt and most output tokens.
            place: takes a place if there is one for it; what it raises is the request's refusal.
            deadline: by the clock; the request is refused if its turn will come later.

        Raises:
            StatusError: RESOURCE_EXHAUSTED with a hint when to try again, or DEADLINE_EXCEEDED.
        """
        waiter = Waiter(self, num_tokens, place, self._new)
        if self.num_waiting:
            self._check_queue(num_tokens, deadline)
        elif self._try_place(waiter):
            return waiter
        self._append(waiter, self._config.unavailable_after_s if not self._num_serving else None)
        return waiter

    def enter_again(self, num_tokens: int, place: Callable[[], PlaceT | None]) -> Waiter[PlaceT]:
        """As `enter` for a request that lost its place: it goes before new ones, and is not refused for their number.

        It is refused, UNAVAILABLE, when it got no place for `resume_timeout_s`.
        """
        waiter = Waiter(self, num_tokens, place, self._begun)
        if self._begun or not self._try_place(waiter):
            self._append(waiter, self._config.resume_timeout_s)
        return waiter

    def leave(self, waiter: Waiter[PlaceT]) -> None:
        """Takes a request out of the queue, if it is there; the next one may be able to go."""
        if self._drop(waiter):
            self.pump()

    def set_serving(self, num_replicas: int) -> None:
        """Notes how many replicas take requests; without one, those that wait do so for a limited time."""
        had, self._num_serving = self._num_serving, num_replicas
        if had != num_replicas:
            self.rate.set_replicas(num_replicas)
        for waiter in self._new.values():
            if num_replicas and waiter.timer is not None:
                waiter.timer.cancel()
                waiter.timer = None
            elif not num_replicas and waiter.timer is None:
                waiter.timer = self._give_up_after(waiter, self._config.unavailable_after_s)
        self.pump()

    def freed(self, num_tokens: int) -> None:
        """Counts tokens that need not be computed any more, and lets in who has room now."""
        self.rate.freed(num_tokens)
        if self._new or self._begun:
            self.pump()

    def pump(self) -> None:
        """Gives places as long as the first in the queue gets one."""
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            for queue in (self._begun, self._new):
                while queue:
                    waiter = next(iter(queue.values()))
                    if not self._try_place(waiter):
                        break
                    self._drop(waiter)
        finally:
            self._is_pumping = False
        self.rate.look(self._clock(), bool(self._new) and self._num_serving > 0)

    def _try_place(self, waiter: Waiter[PlaceT]) -> bool:
        """True when the request does not have to wait: it got a place, or was refused."""
        try:
            place = waiter.place()
        except Exception as error:
            waiter.refuse(error)
            return True
        if place is None:
            return False
        waiter.give(place)
        return True

    def _check_queue(self, num_tokens: int, deadline: float | None) -> None:
        wait_s = self._new.num_tokens / self.rate.tokens_per_s
        if self._new and self._new.num_tokens + num_tokens > self._config.max_queued_tokens:
            retry_after_s = min(max(wait_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)
            raise StatusError.resource_exhausted("too many requests wait", retry_after_s)
        if deadline is not None and self._num_serving and self._clock() + wait_s > deadline:
            raise StatusError.deadline_exceeded(f"the deadline cannot be met: about {wait_s:.1f} s of requests wait")

    def _append(self, waiter: Waiter[PlaceT], give_up_after_s: float | None) -> None:
        waiter.queue[id(waiter)] = waiter
        waiter.queue.num_tokens += waiter.num_tokens
        if give_up_after_s is not None:
            waiter.timer = self._give_up_after(waiter, give_up_after_s)

    def _drop(self, waiter: Waiter[PlaceT]) -> bool:
        if waiter.queue.pop(id(waiter), None) is None:
            return False
        waiter.queue.num_tokens -= waiter.num_tokens
        if waiter.timer is not None:
            waiter.timer.cancel()
        return True

    @staticmethod
    def _give_up_after(waiter: Waiter[PlaceT], seconds: float) -> asyncio.TimerHandle:
        error = StatusError.unavailable("no replica is healthy", retry_after_s=1.0)
        return asyncio.get_running_loop().call_later(seconds, waiter.refuse, error)
