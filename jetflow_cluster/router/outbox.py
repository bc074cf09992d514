"""What is to be sent to one replica, gathered into frames."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from jetflow_cluster.rpc.limits import MAX_REQUEST_BYTES
from jetflow_cluster.rpc.v1 import replica_pb2 as rpb

#: Bytes of a frame behind which no further request is put into it; the longest one fits beside them.
_MAX_FRAME_BYTES = MAX_REQUEST_BYTES // 8


class Outbox:
    """Submissions and aborts on their way. A frame never holds both for one request.

    Args:
        router_id: told to the replica first.
    """

    def __init__(self, router_id: str):
        self._router_id = router_id
        self._submits: dict[str, rpb.Submit] = {}
        self._aborts: list[str] = []
        self._wake = asyncio.Event()

    def submit(self, submit: rpb.Submit) -> None:
        """Adds a request."""
        self._submits[submit.request_id] = submit
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """Adds an abort, or takes the request out if it was not sent yet."""
        if self._submits.pop(request_id, None) is None:
            self._aborts.append(request_id)
            self._wake.set()

    def reset(self, aborts: Iterable[str]) -> None:
        """Behind a break: nothing is to be sent but aborts of what the replica may still run."""
        self._submits.clear()
        self._aborts = list(aborts)
        self._wake.clear()

    def first_frame(self) -> rpb.RouterFrame:
        """The greeting. Requests of a stream that breaks go elsewhere at once, so the replica need not keep them."""
        frame = self._take()
        frame.hello.router_id = self._router_id
        frame.hello.grace_ms = 0
        return frame

    async def next_frame(self, ping_s: float) -> rpb.RouterFrame:
        """The next frame as soon as there is something to send; an empty one behind `ping_s` seconds without."""
        if not self._wake.is_set():
            try:
                async with asyncio.timeout(ping_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
        return self._take()

    def _take(self) -> rpb.RouterFrame:
        frame = rpb.RouterFrame(aborts=[rpb.Abort(request_id=name) for name in self._aborts])
        self._aborts.clear()
        num_bytes = 0
        for request_id in list(self._submits):
            if num_bytes >= _MAX_FRAME_BYTES:
                break
            submit = self._submits.pop(request_id)
            num_bytes += submit.ByteSize()
            frame.submits.append(submit)
        if not self._submits:
            self._wake.clear()
        return frame
