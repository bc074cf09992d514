"""What reaches one request: its replica's events, and what this router decides about it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

#: Kinds of a replica's events; each comes with the message of that name.
STARTED, DELTA, FINISHED, REFUSED = "started", "delta", "finished", "refused"
#: The replica is gone, and with it all that it knew of the request.
LOST = "lost"
#: The request is to end now, with what was delivered; the payload is the error, or None for finish reason ABORT.
ENDED = "ended"


class Inbox:
    """A queue of kinds and payloads with one reader. Unbounded: a request has no more events than tokens."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: deque[tuple[str, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, kind: str, payload: Any = None) -> None:
        """Appends an item and wakes the reader."""
        self._items.append((kind, payload))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> tuple[str, Any]:
        """The next item. Does not suspend when there is one."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()
