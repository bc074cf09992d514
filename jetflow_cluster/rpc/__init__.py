"""The public gRPC API: messages, conversions, errors, and the client. Imports no torch."""

from __future__ import annotations

import os

#: What gRPC should find in its environment when it is loaded. A channel then reads its socket in the thread that waits
#: for its events, where by default four more threads take turns at it: on a small machine a delta costs a client two
#: thirds, and a router three quarters, of the time. Releases that know no such choice ignore it.
GRPC_ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_client"}


def _load_grpc() -> None:
    """gRPC reads its environment once, when it is loaded; processes that are started later should not inherit ours."""
    missing = {name: value for name, value in GRPC_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    import grpc  # noqa: F401

    for name in missing:
        del os.environ[name]


_load_grpc()
