"""Commands arrive in their order, and each side notices when the other is gone or silent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from jetflow_cluster.parallel import channel
from jetflow_cluster.parallel.channel import ChannelClosedError, FollowerChannel, LeaderChannel

SECRET = b"sixteen bytes or more"


def follow(address: tuple[str, int], answers: Any) -> None:
    follower = FollowerChannel(address, SECRET)
    while (commands := follower.receive()) is not None:
        for command in commands:
            answers.put(command)
    answers.put("closed")


@pytest.fixture
def pair() -> Iterator[tuple[LeaderChannel, BaseProcess, Any]]:
    context = multiprocessing.get_context("spawn")
    leader = LeaderChannel("127.0.0.1", 0, SECRET)
    answers = context.Queue()
    process = context.Process(target=follow, args=(leader.address, answers), daemon=True)
    process.start()
    leader.accept(1)
    yield leader, process, answers
    leader.close()
    process.kill()
    process.join()


def wait_until_silent(leader: LeaderChannel, seconds: float) -> tuple[int, float]:
    deadline = time.monotonic() + 20
    while leader.silence()[1] < seconds:
        assert time.monotonic() < deadline, "the silence was not noticed"
        time.sleep(0.01)
    return leader.silence()


def test_small_messages_wait_for_no_acknowledgement() -> None:
    leader = LeaderChannel("127.0.0.1", 0, SECRET)
    joining = threading.Thread(target=leader.accept, args=(1,))
    joining.start()
    follower = FollowerChannel(leader.address, SECRET)
    joining.join()
    for connection in (leader._connections[0], follower._connection):
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    leader.close()
    follower.close()


def test_commands_come_in_their_order(pair: tuple[LeaderChannel, BaseProcess, Any]) -> None:
    leader, _, answers = pair
    leader.send(1)
    leader.defer(2)
    leader.defer(3)
    leader.send(4)
    leader.defer(5)
    leader.close()
    assert [answers.get(timeout=20) for _ in range(6)] == [1, 2, 3, 4, 5, "closed"]


def test_a_follower_that_lives_is_heard(pair: tuple[LeaderChannel, BaseProcess, Any]) -> None:
    leader, _, _ = pair
    first = leader.silence()[1]
    time.sleep(4 * channel.HEARTBEAT_S)
    assert first < leader.silence()[1] + 2 * channel.HEARTBEAT_S
    assert leader.silence()[1] < 3 * channel.HEARTBEAT_S


@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGKILL, float("inf")), (signal.SIGSTOP, 1.5)], ids=["killed", "stopped"]
)
def test_a_follower_that_is_gone_is_noticed(
    pair: tuple[LeaderChannel, BaseProcess, Any], number: signal.Signals, seconds: float
) -> None:
    leader, process, _ = pair
    os.kill(process.pid or 0, number)
    rank, silent_s = wait_until_silent(leader, seconds)
    assert rank == 1
    assert silent_s >= seconds


def test_a_leader_that_is_silent_is_noticed() -> None:
    leader = LeaderChannel("127.0.0.1", 0, SECRET)
    # Nobody accepts, so no heartbeat comes; the handshake needs an answer all the same.
    accepted: list[Any] = []
    door = threading.Thread(target=lambda: accepted.append(leader._listener.accept()))
    door.start()
    follower = FollowerChannel(leader.address, SECRET, silence_s=0.2)
    door.join()
    with pytest.raises(ChannelClosedError, match="the leader was silent"):
        follower.receive()
    accepted[0].close()
    with pytest.raises(ChannelClosedError, match="gone"):
        follower.receive()
    follower.close()
