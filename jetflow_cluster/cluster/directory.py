"""Who serves where: replicas and routers report themselves, routers follow the changes. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

#: Seconds between reports, and after which one who reports no more is forgotten.
REPORT_S = 0.5
FORGET_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Members:
    """Addresses ``host:port`` by name, and a number that grows with every change."""

    version: int = 0
    replicas: dict[str, str] = field(default_factory=dict)
    routers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a member said last."""

    address: str
    #: What it tells of itself: processes by name, and for a replica the seconds by phase of its start.
    about: dict[str, Any]
    heard_at: float


class Directory:
    """The members of one application. Its loss loses nothing: all report again within `REPORT_S`."""

    def __init__(self, forget_s: float = FORGET_S):
        self._forget_s = forget_s
        self._seen: dict[tuple[str, str], Entry] = {}
        self._starting: dict[str, str] = {}
        self._members = Members(version=time.time_ns())
        self._changed = asyncio.Condition()

    async def report(self, kind: str, name: str, address: str, about: dict[str, Any] | None = None) -> None:
        """Notes that a ``replica`` or ``router`` is there."""
        self._starting.pop(name, None)
        self._seen[kind, name] = Entry(address=address, about=about or {}, heard_at=time.monotonic())
        await self._refresh()

    async def note_start(self, name: str, phase: str) -> None:
        """Notes what the start of a replica is at."""
        self._starting[name] = phase

    async def starting(self) -> dict[str, str]:
        """The phase of each replica that starts, by name."""
        return dict(self._starting)

    async def leave(self, kind: str, name: str) -> None:
        """Forgets one at once."""
        self._seen.pop((kind, name), None)
        await self._refresh()

    async def members(self, known_version: int = 0, wait_s: float = 5.0) -> Members:
        """The members; with the version that the caller knows, waits up to `wait_s` for another."""
        await self._refresh()
        if self._members.version == known_version:
            try:
                async with asyncio.timeout(wait_s), self._changed:
                    await self._changed.wait_for(lambda: self._members.version != known_version)
            except TimeoutError:
                await self._refresh()
        return self._members

    async def overview(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What the members tell of themselves, by ``replicas`` and ``routers``, and name."""
        await self._refresh()
        found: dict[str, dict[str, dict[str, Any]]] = {"replicas": {}, "routers": {}}
        for (kind, name), entry in self._seen.items():
            # An address may come with the secret that lets others in.
            found[f"{kind}s"][name] = {"address": entry.address.rpartition("@")[2], **entry.about}
        return found

    async def _refresh(self) -> None:
        oldest = time.monotonic() - self._forget_s
        self._seen = {key: entry for key, entry in self._seen.items() if entry.heard_at >= oldest}
        replicas = {name: entry.address for (kind, name), entry in self._seen.items() if kind == "replica"}
        routers = {name: entry.address for (kind, name), entry in self._seen.items() if kind == "router"}
        if replicas == self._members.replicas and routers == self._members.routers:
            return
        self._members = Members(version=self._members.version + 1, replicas=replicas, routers=routers)
        async with self._changed:
            self._changed.notify_all()
