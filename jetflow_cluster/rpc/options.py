"""gRPC options that both sides of the API have to agree on."""

from __future__ import annotations

from jetflow_cluster.rpc.limits import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES

#: How often a client with a call under way asks a silent connection whether it lives, and how long it waits for the
#: answer, in ms. A router that is stopped is so noticed within 2 s, and its streams go on elsewhere.
_PING_MS, _PING_TIMEOUT_MS = 1_000, 1_000
#: The same of a server.
_SERVER_PING_MS, _SERVER_PING_TIMEOUT_MS = 15_000, 5_000

#: Of a client's channel.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    # Without it gRPC waits a minute for the answer to a ping, whatever the keepalive's timeout is.
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
    # A request may wait in a queue for long; its connection is asked all the while.
    ("grpc.http2.max_pings_without_data", 0),
    # A server that comes back is found soon; the minimum is what one attempt may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

#: Of a server. Without the ping interval a server ends connections that are silent and asked often.
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    ("grpc.keepalive_time_ms", _SERVER_PING_MS),
    ("grpc.keepalive_timeout_ms", _SERVER_PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _SERVER_PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_MS // 2),
    # A port that is taken is an error, and not shared.
    ("grpc.so_reuseport", 0),
)
