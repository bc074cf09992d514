"""Which server is asked next, when, and when no more."""

from __future__ import annotations

from typing import Any

import pytest

from jetflow_cluster.rpc.errors import InvalidFieldsError, StatusError
from jetflow_cluster.rpc.retry import Attempts, RetryPolicy, Servers
from jetflow_cluster.types import InvalidRequestError

GONE = StatusError.unavailable("gone")


@pytest.mark.parametrize(
    "fields, message",
    [
        pytest.param({"max_retries": -1}, "max_retries = -1", id="retries"),
        pytest.param({"max_retries": 11}, "max_retries = 11", id="many-retries"),
        pytest.param({"initial_backoff_s": 0.0}, "initial_backoff_s = 0.0", id="no-backoff"),
        pytest.param({"initial_backoff_s": 5.0}, "max_backoff_s = 2.0", id="backoff"),
        pytest.param({"resume_timeout_s": -1.0}, "resume_timeout_s = -1.0", id="resume"),
        pytest.param({"quarantine_s": -1.0}, "quarantine_s = -1.0", id="quarantine"),
    ],
)
def test_policies_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetryPolicy(**fields)


@pytest.mark.parametrize(
    "num_failures, retry_after_s, low, high",
    [
        pytest.param(1, None, 0.05, 0.1, id="first"),
        pytest.param(3, None, 0.2, 0.4, id="third"),
        pytest.param(9, None, 0.5, 1.0, id="bounded"),
        pytest.param(10_000, None, 0.5, 1.0, id="very-many"),
        pytest.param(1, 3.0, 3.0, 3.75, id="asked-for"),
        pytest.param(9, 0.0, 0.0, 0.0, id="at-once"),
    ],
)
def test_backoff_is_doubled_bounded_and_jittered(
    num_failures: int, retry_after_s: float | None, low: float, high: float
) -> None:
    policy = RetryPolicy(initial_backoff_s=0.1, max_backoff_s=1.0)
    found = {policy.backoff_s(num_failures, retry_after_s) for _ in range(50)}
    assert low <= min(found) <= max(found) <= high
    assert len(found) > 1 or low == high


def test_servers_take_turns_and_failed_ones_come_last() -> None:
    servers = Servers(["a", "b", "c", "a"], quarantine_s=3600.0)
    assert servers.addresses == ("a", "b", "c")
    assert [servers.choose() for _ in range(4)] == ["a", "b", "c", "a"]
    servers.failed("b")
    assert {servers.choose() for _ in range(6)} == {"a", "c"}
    servers.failed("a")
    servers.failed("c")
    assert {servers.choose() for _ in range(6)} == {"b"}


def test_quarantine_ends() -> None:
    servers = Servers(["a", "b"], quarantine_s=0.0)
    servers.failed("a")
    assert {servers.choose() for _ in range(4)} == {"a", "b"}


@pytest.mark.parametrize(
    "error, num_pauses",
    [
        pytest.param(GONE, 3, id="unavailable"),
        pytest.param(StatusError.resource_exhausted("full", 0.0), 3, id="exhausted"),
        pytest.param(StatusError.internal(), 0, id="internal"),
        pytest.param(StatusError.aborted("lost", 1), 0, id="aborted"),
        pytest.param(InvalidFieldsError([InvalidRequestError("a", 1, "b")]), 0, id="invalid"),
    ],
)
def test_attempts_are_counted(error: Any, num_pauses: int) -> None:
    attempts = Attempts(RetryPolicy(), Servers(["a", "b"], quarantine_s=60.0), None)
    for turn in range(num_pauses):
        assert attempts.address == "ab"[turn % 2]
        attempts.pause_s(error)
    with pytest.raises(type(error)) as caught:
        attempts.pause_s(error)
    assert caught.value is error


def test_progress_counts_anew_and_bounds_by_time() -> None:
    attempts = Attempts(RetryPolicy(max_retries=0), Servers("a", quarantine_s=0.0), None)
    attempts.progressed()
    for _ in range(20):
        attempts.pause_s(StatusError.unavailable("gone", 0.0))
    with pytest.raises(StatusError, match="gone"):
        attempts.pause_s(StatusError.unavailable("gone", 31.0))


def test_no_pause_goes_beyond_the_deadline() -> None:
    attempts = Attempts(RetryPolicy(), Servers("a", quarantine_s=0.0), 30.0)
    assert 0 < (attempts.timeout_s or 0) <= 30.0
    with pytest.raises(StatusError, match="full"):
        attempts.pause_s(StatusError.resource_exhausted("full", 40.0))


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_timeouts_are_positive(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        Attempts(RetryPolicy(), Servers("a", quarantine_s=0.0), timeout_s)
