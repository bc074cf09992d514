"""Which replica a request goes to."""

from __future__ import annotations

from typing import Any

import pytest

from jetflow_cluster.router.policy import Candidate, choose_replica, rank_by_session


def candidates(**loads: Any) -> list[Candidate]:
    """``name=(outstanding, cached, flags)``; flags: ``q`` quarantined, ``d`` draining."""
    return [
        Candidate(
            replica_id=name,
            outstanding_tokens=outstanding,
            cached_tokens=cached,
            is_healthy="q" not in flags,
            is_draining="d" in flags,
        )
        for name, (outstanding, cached, flags) in loads.items()
    ]


@pytest.mark.parametrize(
    "replicas, avoided, chosen",
    [
        pytest.param({}, (), None, id="none"),
        pytest.param({"a": (0, 0, "q"), "b": (0, 0, "d")}, (), None, id="none-eligible"),
        pytest.param({"a": (5, 0, ""), "b": (4, 0, "")}, (), "b", id="least-loaded"),
        pytest.param({"b": (4, 0, ""), "a": (4, 0, "")}, (), "a", id="tie-by-name"),
        pytest.param({"a": (100, 16, ""), "b": (0, 0, "")}, (), "a", id="prefix-at-the-bound"),
        pytest.param({"a": (101, 64, ""), "b": (0, 0, "")}, (), "b", id="prefix-beyond-the-bound"),
        pytest.param({"a": (0, 16, ""), "b": (90, 32, "")}, (), "b", id="longest-prefix"),
        pytest.param({"a": (50, 32, ""), "b": (20, 32, "")}, (), "b", id="equal-prefixes-least-loaded"),
        pytest.param({"a": (0, 64, "q"), "b": (9, 0, "")}, (), "b", id="quarantined-has-the-prefix"),
        pytest.param({"a": (0, 64, "d"), "b": (9, 0, "")}, (), "b", id="draining-has-the-prefix"),
        pytest.param({"a": (0, 0, "q"), "b": (90, 0, ""), "c": (150, 32, "")}, (), "c", id="bound-among-healthy-ones"),
        pytest.param({"a": (0, 64, ""), "b": (500, 0, "")}, ("a",), "b", id="avoided"),
        pytest.param({"a": (0, 0, ""), "b": (0, 0, "q")}, ("a",), "a", id="avoided-but-the-only-one"),
    ],
)
def test_choice(replicas: dict[str, Any], avoided: tuple[str, ...], chosen: str | None) -> None:
    assert choose_replica(candidates(**replicas), load_bound_tokens=100, avoided=avoided) == chosen


def test_a_session_stays_where_it_is_unless_that_replica_is_loaded_or_away() -> None:
    names = ["a", "b", "c"]
    for session in map(str, range(40)):
        first, second, third = rank_by_session(session, names)

        def choose(session: str = session, **loads: Any) -> str | None:
            replicas = candidates(**dict.fromkeys(names, (0, 0, "")) | loads)
            return choose_replica(replicas, load_bound_tokens=100, session_id=session)

        assert choose(**{second: (0, 64, "")}) == first, "the session goes before another prefix"
        assert choose(**{first: (100, 0, "")}) == first
        assert choose(**{first: (101, 0, "")}) == second
        assert choose(**{first: (0, 0, "q")}) == second
        assert choose(**{first: (0, 0, "d"), second: (101, 0, "")}) == third


def test_sessions_are_shared_evenly_and_move_only_with_their_replica() -> None:
    names = ["a", "b", "c", "d"]
    before = {session: rank_by_session(session, names)[0] for session in map(str, range(4000))}
    counts = [list(before.values()).count(name) for name in names]
    assert min(counts) > 850 and max(counts) < 1150
    for session, replica in before.items():
        if replica != "c":
            assert rank_by_session(session, ["a", "b", "d"])[0] == replica
