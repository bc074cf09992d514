"""Who serves where: replicas and routers report themselves, routers follow the changes. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from jetflow_kernels.machine import Arithmetic

#: Seconds between reports, and after which one who reports no more is forgotten.
REPORT_S = 0.5
FORGET_S = 2.0
#: Seconds for which one that starts may have others compute as it does without having reported.
START_LIMIT_S = 120.0


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


@dataclass(frozen=True, kw_only=True)
class Claim:
    """How a replica computes, or wants to."""

    #: What its configuration and those of the replicas of one deployment have in common.
    deployment: str
    arithmetic: Arithmetic
    claimed_at: float


class Directory:
    """The members of one application. Its loss loses nothing: all report again within `REPORT_S`."""

    def __init__(self, forget_s: float = FORGET_S):
        self._forget_s = forget_s
        self._seen: dict[tuple[str, str], Entry] = {}
        self._starting: dict[str, str] = {}
        #: By replica, the earliest first.
        self._claims: dict[str, Claim] = {}
        self._members = Members(version=time.time_ns())
        self._changed = asyncio.Condition()

    async def report(self, kind: str, name: str, address: str, about: dict[str, Any] | None = None) -> None:
        """Notes that a ``replica`` or ``router`` is there."""
        self._starting.pop(name, None)
        if about is not None and name not in self._claims and "arithmetic" in about:
            # This directory may be younger than the replica.
            deployment, arithmetic = about["arithmetic"]
            self._claims[name] = Claim(deployment=deployment, arithmetic=arithmetic, claimed_at=time.monotonic())
        self._seen[kind, name] = Entry(address=address, about=about or {}, heard_at=time.monotonic())
        await self._refresh()

    async def agree(self, name: str, deployment: str, arithmetic: Arithmetic) -> Arithmetic:
        """How the replicas of a deployment compute: as the first one does of those that are there or start.

        Args:
            name: of the replica that asks.
            deployment: equal for replicas of one deployment.
            arithmetic: what it would compute in by itself.
        """
        await self._refresh()
        now = time.monotonic()
        self._claims = {
            other: claim
            for other, claim in self._claims.items()
            if ("replica", other) in self._seen or now - claim.claimed_at < START_LIMIT_S
        }
        same = [claim.arithmetic for claim in self._claims.values() if claim.deployment == deployment]
        agreed = same[0] if same else arithmetic
        self._claims[name] = Claim(deployment=deployment, arithmetic=agreed, claimed_at=now)
        return agreed

    async def note_start(self, name: str, phase: str) -> None:
        """Notes what the start of a replica is at."""
        self._starting[name] = phase

    async def starting(self) -> dict[str, str]:
        """The phase of each replica that starts, by name."""
        return dict(self._starting)

    async def leave(self, kind: str, name: str) -> None:
        """Forgets one at once."""
        self._seen.pop((kind, name), None)
        self._claims.pop(name, None)
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
