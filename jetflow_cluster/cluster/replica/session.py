"""One router's stream, as the replica writes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import grpc

from jetflow_cluster.cluster.replica.config import ReplicaServerConfig
from jetflow_cluster.cluster.replica.events import is_news, num_bytes_of
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb

_UNREAD = "the replica's frames were not read in time"


class RouterSession:
    """Events on their way to one router. Belongs to one event loop.

    One frame is written at a time, and what comes meanwhile goes into the next. A router that does not take a frame
    within `stall_timeout_s`, or lets more than `max_pending_events` gather, loses its stream: to it the replica is
    lost, and what it did not read is computed again elsewhere.

    Args:
        router_id: who attached.
        owner: in whose name the step loop runs the requests of this stream.
        grace_s: how long they outlive it.
        config: of the replica.
        load: the replica's load at this moment.
    """

    def __init__(
        self,
        router_id: str,
        owner: str,
        grace_s: float,
        config: ReplicaServerConfig,
        load: Callable[[], pb.ReplicaLoad],
    ):
        self.router_id, self.owner, self.grace_s = router_id, owner, grace_s
        #: Keys of the requests that came through this stream and run.
        self.keys: set[str] = set()
        #: False once nothing more is told on this stream.
        self.is_open = True
        self._config, self._load = config, load
        self._events: deque[rpb.ReplicaEvent] = deque()
        self._step = 0
        self._wake = asyncio.Event()
        self._is_closing = False
        self._error: StatusError | None = None
        self._patience: asyncio.Timeout | None = None
        #: The load that was told last, and when.
        self._told: pb.ReplicaLoad | None = None
        self._told_at_s = 0.0

    def put(self, events: Iterable[rpb.ReplicaEvent], step: int | None = None) -> None:
        """Appends events, those of a step together; they are dropped when the stream is at its end."""
        if not self.is_open or self._is_closing:
            return
        self._events.extend(events)
        self._step = self._step if step is None else step
        if len(self._events) > self._config.max_pending_events:
            self.break_off(StatusError.unavailable(_UNREAD))
        self._wake.set()

    def nudge(self) -> None:
        """Sends a frame with the load soon."""
        self._told = None
        self._wake.set()

    def close(self) -> None:
        """Ends the stream behind what is still to be told."""
        self._is_closing = True
        self._wake.set()

    def break_off(self, error: StatusError) -> None:
        """Ends the stream now; what was not told is dropped."""
        self._events.clear()
        self.is_open, self._error = False, error
        self._wake.set()
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())

    async def write_to(self, write: Callable[[rpb.ReplicaFrame], Awaitable[None]]) -> None:
        """Writes frames until the stream is closed, or its router is gone.

        Raises:
            StatusError: the stream was broken off.
        """
        while self.is_open and not (self._is_closing and not self._events):
            frame = await self._next_frame()
            if frame is None:
                continue
            try:
                async with asyncio.timeout(self._config.stall_timeout_s) as self._patience:
                    await write(frame)
            except TimeoutError:
                self.break_off(self._error or StatusError.unavailable(_UNREAD))
            except (grpc.aio.UsageError, grpc.aio.InternalError):
                # Written to a call that has ended.
                self.is_open = False
            finally:
                self._patience = None
        self.is_open = False
        if self._error is not None:
            raise self._error

    async def _next_frame(self) -> rpb.ReplicaFrame | None:
        """The next events with the load if it is due; a heartbeat when there are none for a while; None at the end."""
        is_first = self._told is None and not self._told_at_s
        if not (is_first or self._events or self._wake.is_set()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.heartbeat_s):
                    await self._wake.wait()
        self._wake.clear()
        if not self.is_open:
            return None
        frame = rpb.ReplicaFrame(step=self._step, events=self._take())
        load, now_s = self._load(), asyncio.get_running_loop().time()
        is_due = now_s - self._told_at_s >= self._config.heartbeat_s
        if not frame.events or is_due or self._told is None or is_news(self._told, load):
            frame.load.CopyFrom(load)
            self._told, self._told_at_s = load, now_s
        return frame

    def _take(self) -> list[rpb.ReplicaEvent]:
        """As many events as fit a frame, and one at least if there is any."""
        taken: list[rpb.ReplicaEvent] = []
        room = self._config.max_frame_bytes
        while self._events and (room > 0 or not taken):
            room -= num_bytes_of(self._events[0])
            if room >= 0 or not taken:
                taken.append(self._events.popleft())
        return taken
