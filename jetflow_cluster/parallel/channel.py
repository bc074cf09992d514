"""Commands from a leader to its followers: small messages over sockets that nobody polls.

No collective is left open while there is nothing to do, so an idle group costs no CPU. Heartbeats go both ways, so
that each side knows whether the other lives, also while it computes.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from jetflow_cluster.parallel.sockets import send_at_once

#: Seconds between heartbeats, and how long a follower believes in a silent leader.
HEARTBEAT_S = 0.5
SILENCE_S = 5.0


class ChannelClosedError(ConnectionError):
    """The other side is gone, or has been silent for too long."""


class LeaderChannel:
    """The leader's end. One thread sends commands; heartbeats come from a thread of its own.

    Args:
        host: address to listen on, one that the followers reach.
        port: 0 takes a free one; see `address`.
        secret: what followers prove to know; at least 16 bytes.
    """

    def __init__(self, host: str, port: int, secret: bytes):
        if len(secret) < 16:
            raise ValueError(f"secret of {len(secret)} bytes: must be at least 16")
        self._listener = Listener((host, port), family="AF_INET", backlog=64, authkey=secret)
        self._connections: list[Connection] = []
        self._heard_at: dict[Connection, float] = {}
        self._deferred: list[Any] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for the followers."""
        host, port = self._listener.address[:2]
        return str(host), int(port)

    def accept(self, num_followers: int) -> None:
        """Waits until so many followers are there, then starts the heartbeat."""
        for _ in range(num_followers):
            self._connections.append(send_at_once(self._listener.accept()))
        self._listener.close()
        self._heard_at = dict.fromkeys(self._connections, time.monotonic())
        threading.Thread(target=self._beat, name="channel-heartbeat", daemon=True).start()
        threading.Thread(target=self._listen, name="channel-listener", daemon=True).start()

    def silence(self) -> tuple[int, float]:
        """The rank that has been silent for longest, and the seconds; infinite when it is gone, 0 without followers."""
        now = time.monotonic()
        silent = [now - self._heard_at[connection] for connection in self._connections]
        return max(enumerate(silent, 1), key=lambda entry: entry[1], default=(0, 0.0))

    def defer(self, command: Any) -> None:
        """Sends a command together with the next one that is sent."""
        self._deferred.append(command)

    def send(self, command: Any) -> None:
        """Sends to all followers; they run commands in the order of `defer` and `send`.

        Raises:
            ChannelClosedError: a follower is gone.
        """
        commands, self._deferred = [*self._deferred, command], []
        self._write(commands)

    def close(self) -> None:
        """Ends the followers' loops; sends what was deferred first."""
        if self._closed.is_set():
            return
        self._closed.set()
        commands, self._deferred = self._deferred, []
        with contextlib.suppress(ChannelClosedError):
            self._write([*commands, None])
        for connection in self._connections:
            connection.close()
        self._listener.close()

    def _write(self, commands: Sequence[Any]) -> None:
        data = pickle.dumps(commands, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            for rank, connection in enumerate(self._connections, 1):
                try:
                    connection.send_bytes(data)
                except OSError as error:
                    raise ChannelClosedError(f"rank {rank} is gone: {error}") from None

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            try:
                self._write([])
            except ChannelClosedError:
                return

    def _listen(self) -> None:
        alive = list(self._connections)
        while alive and not self._closed.is_set():
            for connection in wait(alive, HEARTBEAT_S):
                assert isinstance(connection, Connection)
                try:
                    connection.recv_bytes()
                    self._heard_at[connection] = time.monotonic()
                except (EOFError, OSError):
                    alive.remove(connection)
                    self._heard_at[connection] = -float("inf")


class FollowerChannel:
    """A follower's end.

    Args:
        address: host and port of the leader.
        secret: as the leader's.
        connect_timeout_s: how long to wait for the leader to listen.
        silence_s: how long to believe in a silent leader.
    """

    def __init__(
        self, address: tuple[str, int], secret: bytes, *, connect_timeout_s: float = 60.0, silence_s: float = SILENCE_S
    ):
        self._silence_s, self._has_ended = silence_s, False
        self._closed = threading.Event()
        self._connection = self._connect(address, secret, connect_timeout_s)
        threading.Thread(target=self._beat, name="channel-heartbeat", daemon=True).start()

    @staticmethod
    def _connect(address: tuple[str, int], secret: bytes, connect_timeout_s: float) -> Connection:
        deadline = time.monotonic() + connect_timeout_s
        while True:
            try:
                return send_at_once(Client((address[0], address[1]), family="AF_INET", authkey=secret))
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise ChannelClosedError(f"nobody listens at {address[0]}:{address[1]}") from None
                time.sleep(0.05)

    def receive(self) -> list[Any] | None:
        """The next commands; None when the leader closed the channel. Heartbeats are swallowed.

        Raises:
            ChannelClosedError: the leader is gone, or was silent for `silence_s`.
        """
        while not self._has_ended:
            try:
                if not self._connection.poll(self._silence_s):
                    raise ChannelClosedError(f"the leader was silent for {self._silence_s:g} s")
                commands: list[Any] = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError) as error:
                if isinstance(error, ChannelClosedError):
                    raise
                raise ChannelClosedError(f"the leader is gone: {error or 'end of stream'}") from None
            if commands and commands[-1] is None:
                self._has_ended = True
                commands.pop()
            if commands:
                return commands
        return None

    def close(self) -> None:
        """Lets go of the connection."""
        self._closed.set()
        self._connection.close()

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            try:
                self._connection.send_bytes(b"")
            except OSError:
                return
