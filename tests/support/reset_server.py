"""A server that resets every call as a proxy or a leaving server does, without a status of its own."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jetflow_cluster.rpc.v1 import inference_pb2 as pb

# Frames of HTTP/2 (RFC 9113), and the headers of an answer by gRPC in HPACK: an indexed status, a literal type.
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING = 0, 1, 3, 4, 6
_ACK, _END_HEADERS = 1, 4
_PREFACE_BYTES, _HEAD_BYTES = 24, 9
_CANCEL = 8
_READ_S = 0.2
_ANSWER = b"\x88\x00\x0ccontent-type\x10application/grpc"


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError
        data += part
    return data


def _serve(connection: socket.socket, events: Sequence[pb.GenerateEvent]) -> None:
    _exactly(connection, _PREFACE_BYTES)
    connection.sendall(_frame(_SETTINGS, 0, 0))
    while True:
        head = _exactly(connection, _HEAD_BYTES)
        length, (kind, flags, stream) = int.from_bytes(head[:3], "big"), struct.unpack(">BBI", head[3:])
        payload = _exactly(connection, length)
        if kind in (_SETTINGS, _PING) and not flags & _ACK:
            connection.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _HEADERS:
            messages = [event.SerializeToString() for event in events]
            data = b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)
            told = _frame(_HEADERS, _END_HEADERS, stream, _ANSWER) + _frame(_DATA, 0, stream, data) if events else b""
            connection.sendall(told)
            # gRPC drops what it has not read when a stream is reset.
            time.sleep(_READ_S if events else 0)
            connection.sendall(_frame(_RST_STREAM, 0, stream, struct.pack(">I", _CANCEL)))


@contextmanager
def reset_server(events: Sequence[pb.GenerateEvent]) -> Iterator[str]:
    """The address of a server that answers each call with these events and resets its stream."""

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=run, args=(connection,), daemon=True).start()

    def run(connection: socket.socket) -> None:
        with connection:
            try:
                _serve(connection, events)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
