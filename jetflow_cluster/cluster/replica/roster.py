"""Which routers are attached, and whose requests run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from jetflow_cluster.cluster.replica.session import RouterSession


@dataclass(kw_only=True, eq=False)
class Running:
    """A request that a router waits for."""

    request_id: str
    #: Its id in the engine.
    key: str
    session: RouterSession
    #: Ends it when its time is over.
    timer: asyncio.TimerHandle | None = None


class Roster:
    """Streams by router, requests by key and by name. Belongs to one event loop."""

    def __init__(self) -> None:
        #: The stream of each router that is attached.
        self._open: dict[str, RouterSession] = {}
        self._by_key: dict[str, Running] = {}
        self._by_id: dict[str, Running] = {}

    def streams(self) -> list[RouterSession]:
        """The open ones."""
        return list(self._open.values())

    def stream_of(self, router_id: str) -> RouterSession | None:
        """The open stream of a router."""
        return self._open.get(router_id)

    def attach(self, session: RouterSession) -> None:
        """A stream begins."""
        self._open[session.router_id] = session

    def detach(self, session: RouterSession) -> None:
        """A stream ends; its requests stay."""
        session.is_open = False
        if self._open.get(session.router_id) is session:
            del self._open[session.router_id]

    def end(self, session: RouterSession) -> bool:
        """Forgets the requests of a stream; True when there were any."""
        ended = [self._by_key[key] for key in session.keys]
        for running in ended:
            self.forget(running)
        return bool(ended)

    def requests(self) -> list[Running]:
        """All that run."""
        return list(self._by_key.values())

    def by_key(self, key: str) -> Running | None:
        """The request that is in the engine under a key; None when nobody waits for it any more."""
        return self._by_key.get(key)

    def by_id(self, request_id: str) -> Running | None:
        """The request that routers know by a name."""
        return self._by_id.get(request_id)

    def add(self, running: Running) -> None:
        """A request begins; its name is free."""
        self._by_key[running.key] = self._by_id[running.request_id] = running
        running.session.keys.add(running.key)

    def forget(self, running: Running) -> None:
        """A request has ended, or nobody waits for it any more."""
        del self._by_key[running.key], self._by_id[running.request_id]
        running.session.keys.discard(running.key)
        if running.timer is not None:
            running.timer.cancel()
