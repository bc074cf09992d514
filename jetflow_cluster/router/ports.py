"""Ports that routers of one cluster hand over to each other."""

from __future__ import annotations

import socket


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there, those included who would share the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections that ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
