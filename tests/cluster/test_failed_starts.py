"""Sentences of starts that fail, as they are made and found again."""

from __future__ import annotations

import sys
import traceback

import pytest
import ray

from jetflow_cluster.cluster.failures import LostError, StartError, failed_start, read_failure, starting
from jetflow_cluster.cluster.handshake import Place

PLACE = Place(node="10.0.0.2", pid=7, log="/logs/worker.err")


def _task_error(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("start", "Traceback: ...", cause, pid=7, ip="10.0.0.2")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        pytest.param(ValueError("x = 1: at most 0"), StartError, "x = 1: at most 0", id="own"),
        pytest.param(_task_error(ValueError("x = 1:\n  at most 0")), StartError, "x = 1: at most 0", id="of-an-actor"),
        pytest.param(KeyError("x"), StartError, "KeyError 'x'", id="no-sentence"),
        pytest.param(AssertionError(), StartError, "AssertionError", id="no-text"),
        pytest.param(ray.exceptions.ActorDiedError(), LostError, "its process 7 ended while it started", id="lost"),
        pytest.param(ray.exceptions.GetTimeoutError(), LostError, "has not answered in time", id="silent"),
    ],
)
def test_sentences(error: Exception, kind: type[StartError], text: str) -> None:
    found = failed_start("shard 1", PLACE, error)
    assert type(found) is kind
    assert str(found).startswith(f"shard 1 on node 10.0.0.2: {text}")
    assert str(found).endswith("; log: /logs/worker.err")


def test_a_sentence_is_passed_on_as_it_is() -> None:
    sentence = StartError("shard 1 on node a: no; log: b")
    assert failed_start("engine replica", PLACE, _task_error(sentence)) is sentence


@pytest.mark.parametrize("kind", [StartError, LostError])
def test_a_status_message_has_the_sentence_and_no_stack(
    kind: type[StartError], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Serve makes the message.
    monkeypatch.setattr(sys, "tracebacklimit", 10, raising=False)
    try:
        with starting("router a"):
            raise kind("router a on node b: grpc_port = 1: taken; log: c")
    except StartError:
        message = f"A replica failed to start. Error:\nRuntimeError: {traceback.format_exc()}"
    assert "File" not in message
    found = read_failure(message)
    assert type(found) is kind
    assert str(found) == "router a on node b: grpc_port = 1: taken; log: c"


def test_other_messages_tell_of_none() -> None:
    assert read_failure("") is None
    assert read_failure("The deployment failed to start 3 times in a row. StartError: no") is None
