"""Names of requests: ``router:replica:number``, unique over routers, replicas and restarts."""

from __future__ import annotations

import itertools
import secrets

from jetflow_cluster.router.config import ID_SEPARATOR


class RequestIds:
    """Gives the ids of one router's requests; two routers of one name, one after the other, give different ones."""

    def __init__(self, router_id: str):
        self._router_id = router_id
        self._incarnation = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def new(self, replica_id: str) -> str:
        """The id of a request that goes to a replica."""
        return ID_SEPARATOR.join((self._router_id, replica_id, f"{self._incarnation}-{next(self._numbers)}"))


def owner_of(request_id: str) -> str | None:
    """The router that gave the id; None for an id that a caller chose. A caller's id may look like a given one."""
    parts = request_id.split(ID_SEPARATOR)
    return parts[0] if len(parts) == 3 and all(parts) else None
