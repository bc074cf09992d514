"""Ports that routers of one cluster hand over to each other."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterable, Iterator

_log = logging.getLogger(__name__)
#: Linux's number of the option; the socket module has no name for it.
_SO_ATTACH_REUSEPORT_CBPF = 51
#: A program of one instruction, ``return``, whose operand is a place in the order in which a port's listeners came.
_RETURN, _SECOND = 0x06, 1


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there, those included who would share the port."""
    return why_not_free(host, port) is None


def why_not_free(host: str, port: int) -> str | None:
    """Why nobody could listen there, in words; None where that is possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections that ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return (
                "another program has it" if error.errno == errno.EADDRINUSE else f"{error.strerror} on host = {host!r}"
            )
    return None


def claim(port: int) -> socket.socket | None:
    """Reserves a port on which another process is about to listen, against others of this machine that do the same.

    Between `is_free` and that process's own bind seconds may pass, in which another user's start finds it free too.

    Returns:
        What holds the claim until it is closed or this process ends; None if the port is claimed or taken.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A name that is no file: it belongs to nobody's folder, and is gone with the process.
        holder.bind(f"\0jetflow-port-{port}")
    except OSError:
        holder.close()
        return None
    if not is_free("0.0.0.0", port):
        holder.close()
        return None
    return holder


def prefer_younger(ports: Iterable[int]) -> None:
    """New connections to these ports go to whoever listened second, if there is one, and no more to the first.

    Without it the kernel spreads them by a hash, and closing a listener resets those that it holds and nobody has
    accepted. Does nothing where the kernel is not Linux, or refuses.

    Args:
        ports: that this process listens on, and shares.
    """
    if not sys.platform.startswith("linux"):
        return
    code = ctypes.create_string_buffer(struct.pack("HBBI", _RETURN, 0, 0, _SECOND))
    program = struct.pack("HP", 1, ctypes.addressof(code))
    for listener in _listeners(set(ports)):
        try:
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)
        except OSError as error:
            _log.info("connections cannot be steered to the next router: %s", error)


def _listeners(ports: Collection[int]) -> Iterator[socket.socket]:
    """This process's sockets that listen on these ports, gRPC's too, which it shows to nobody."""
    for name in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(name))
        except OSError:
            continue
        try:
            found = socket.socket(fileno=fd)
        except OSError:
            # No socket.
            os.close(fd)
            continue
        with found:
            is_tcp = found.type == socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6)
            is_listening = is_tcp and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if is_listening and found.getsockname()[1] in ports:
                yield found
