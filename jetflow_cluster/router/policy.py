"""Which replica a request goes to. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A replica as the choice sees it."""

    replica_id: str
    #: Prompt and output tokens that it still has to compute.
    outstanding_tokens: int
    #: Tokens of the request's prompt that it is thought to have cached.
    cached_tokens: int = 0
    #: False while it is quarantined, or says itself that it cannot serve.
    is_healthy: bool = True
    #: True when it takes nothing new.
    is_draining: bool = False


def choose_replica(
    candidates: Iterable[Candidate],
    *,
    load_bound_tokens: int,
    session_id: str = "",
    avoided: Collection[str] = (),
) -> str | None:
    """The replica that a request goes to; None when none may take it.

    Only healthy replicas that are not draining are looked at. Of those that exceed the least loaded one by no more than
    the bound, the one that the session hashes to is taken, or else the one with the longest cached prefix, or else the
    least loaded one. Ties go to the least loaded, then by name.

    Args:
        candidates: all replicas.
        load_bound_tokens: outstanding tokens by which a preferred one may exceed the least loaded one.
        session_id: requests with the same one prefer one replica; empty is none.
        avoided: replicas that are taken only if there is no other.
    """
    eligible = [c for c in candidates if c.is_healthy and not c.is_draining]
    eligible = [c for c in eligible if c.replica_id not in avoided] or eligible
    if not eligible:
        return None
    least = min(candidate.outstanding_tokens for candidate in eligible)
    within = [c for c in eligible if c.outstanding_tokens - least <= load_bound_tokens]
    if session_id:
        return rank_by_session(session_id, [c.replica_id for c in within])[0]
    return min(within, key=lambda c: (-c.cached_tokens, c.outstanding_tokens, c.replica_id)).replica_id


def rank_by_session(session_id: str, replica_ids: Sequence[str]) -> list[str]:
    """The replicas in a session's order of preference (rendezvous hashing).

    A replica that leaves moves only the sessions that it was first for; one that comes takes an equal share of all.
    """

    def weight(replica_id: str) -> bytes:
        return hashlib.blake2b(f"{session_id}\0{replica_id}".encode(), digest_size=8).digest()

    return sorted(replica_ids, key=lambda replica_id: (weight(replica_id), replica_id), reverse=True)
